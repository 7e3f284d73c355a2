"""Settings of the short training runs that tests make."""

from oprd_nb.training.config import OPRDConfig

SHORT = dict(
    max_steps=3,
    learning_rate=1e-3,
    per_device_train_batch_size=8,
    gradient_accumulation_steps=1,
    num_generations=1,
    max_completion_length=40,
    bf16=False,
    gradient_checkpointing=False,
    use_cpu=True,
    disable_tqdm=True,
    report_to="none",
    save_strategy="no",
)


def short_run(folder, **changes) -> OPRDConfig:
    """A run of three steps of eight responses on the CPU, in float32, with `changes`."""
    return OPRDConfig(str(folder), **(SHORT | changes))
