/* The dialog of projector mode: which screen is shown, and what is asked of the server for it.

   A screen is asked for by `submit`; its answers come as `manet-screen`, and are kept until the dialog is closed or
   another film is chosen, so that going back costs nothing. */

const dialog = element.querySelector('dialog'), find = selector => dialog.querySelector(selector);
const titles = JSON.parse(dialog.dataset.titles), films = find('select');
const [back, next] = dialog.querySelectorAll('[data-by]');
let at = 0, asked = 0, known = new Map();

function draw(html) { find('.screen').innerHTML = html; }

function show() {
  find('h2').textContent = titles[at];
  find('.at').textContent = `${at + 1} of ${titles.length}`;
  back.ariaDisabled = String(at === 0);  // disabled, a button would lose the focus, and keys with it
  next.ariaDisabled = String(at === titles.length - 1);
  asked += 1;  // whatever is under way is not wanted any more
  if (known.has(at)) return draw(known.get(at));
  draw('');
  trigger('submit', {screen: at, film: films.value, asked});
}

function go(by) {
  const wanted = at + by;
  if (wanted < 0 || wanted >= titles.length) return;
  at = wanted;
  show();
}

async function start() {
  known = new Map();
  at = 0;
  const shown = document.querySelector('.viewer.on') !== null;
  films.options[0].disabled = !shown;
  films.value = shown ? dialog.dataset.viewer : dialog.dataset.default;
  await document.documentElement.requestFullscreen?.().catch(() => {});  // refused: the dialog fills the window
  dialog.showModal();
  show();
}

addEventListener('manet-screen', event => {
  if (!event.detail) return;
  const answer = JSON.parse(event.detail);
  if (answer.asked !== asked || !dialog.open) return;
  if (answer.done) known.set(answer.screen, answer.html);
  draw(answer.html);
});

dialog.addEventListener('keydown', event => {
  if (event.ctrlKey || event.altKey || event.metaKey || event.target === films) return;
  const by = {ArrowRight: 1, PageDown: 1, ArrowLeft: -1, PageUp: -1}[event.key];
  if (!by) return;
  event.preventDefault();
  go(by);
});
for (const button of [back, next]) button.addEventListener('click', () => go(Number(button.dataset.by)));
films.addEventListener('change', () => { known = new Map(); show(); });
find('.leave').addEventListener('click', () => dialog.close());
element.querySelector('.start').addEventListener('click', start);

// Escape leaves the full screen, the dialog, or first one and then the other, as the browser has it.
document.addEventListener('fullscreenchange', () => { if (!document.fullscreenElement) dialog.close(); });
dialog.addEventListener('close', () => {
  asked += 1;
  draw('');
  if (document.fullscreenElement) document.exitFullscreen();
});
