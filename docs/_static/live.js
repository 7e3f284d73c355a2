// A saved picture becomes a live figure when it comes into view. The plotting library is loaded once, when needed.
(() => {
  const DARK = {
    '#222222': '#E8E8E8', '#000000': '#FFFFFF', '#666666': '#A6A6A6', '#EBEBEB': '#303030',
    '#B0B0B0': '#707070', '"white"': '"#131416"', 'rgba(255,255,255,0.7)': 'rgba(19,20,22,0.7)',
  };
  const system = matchMedia('(prefers-color-scheme: dark)');
  const isDark = () => {
    const theme = document.body.dataset.theme;
    return theme === 'dark' || (theme !== 'light' && system.matches);
  };
  const here = document.currentScript.src;
  let library;
  const load = () => library ??= new Promise((done, failed) => {
    const script = document.createElement('script');
    script.src = new URL('plotly.min.js', here).href;
    script.onload = done;
    script.onerror = failed;
    document.head.append(script);
  });
  const draw = async place => {
    await load();
    let text = place.querySelector('script').textContent;
    if (isDark()) for (const [light, dark] of Object.entries(DARK)) text = text.replaceAll(light, dark);
    const {data, layout} = JSON.parse(text);
    let target = place.querySelector('div');
    if (!target) {
      target = document.createElement('div');
      place.append(target);
    }
    await Plotly.react(target, data, layout, {displayModeBar: false});
    place.querySelector('img')?.remove();
    place.dataset.drawn = '';
  };
  addEventListener('DOMContentLoaded', () => {
    const places = [...document.querySelectorAll('.live')];
    const watcher = new IntersectionObserver(entries => {
      for (const {isIntersecting, target} of entries)
        if (isIntersecting) { watcher.unobserve(target); draw(target).catch(() => {}); }
    }, {rootMargin: '200px'});
    places.forEach(place => watcher.observe(place));
    const again = () => places.filter(place => 'drawn' in place.dataset).forEach(place => draw(place));
    new MutationObserver(again).observe(document.body, {attributeFilter: ['data-theme']});
    system.addEventListener('change', again);
  });
})();
