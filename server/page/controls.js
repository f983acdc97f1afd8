// Buttons, keys, files that are dropped: what is done with the page, as calls of what it can do.

import { refit } from './looks.js';

const $ = (id) => document.getElementById(id);
const FILES = { download: 'video.mp4', making: 'video.json', schedule: 'schedule.yaml', 'start-image': 'image.png' };

/** What can be pressed now. `going`: the server makes the video, or will. */
export function drawControls({ video, going, paused, camera }) {
  const some = video.path().length > 0, kept = some && Boolean(video.session);
  $('go').textContent = going ? 'Change' : 'Start';
  for (const id of ['pause', 'restart', 'live']) $(id).disabled = !some;
  $('fork').disabled = !going || !some || video.fromCamera;
  $('compare').disabled = !kept || video.tips.size < 2;
  $('pause').textContent = paused ? 'Play' : 'Pause';
  $('camera').setAttribute('aria-pressed', String(Boolean(camera)));
  $('start-image').hidden = !video.fromImage;
  for (const [id, name] of Object.entries(FILES)) {
    $(id).setAttribute('aria-disabled', String(!kept));
    if (kept) $(id).href = `/v1/sessions/${video.session}/${name}?branch=${video.branch}`;
    else $(id).removeAttribute('href');
  }
}

/** Prompts to press, or to take by their number. */
export function offerPrompts(prompts, onChoice) {
  $('quick').append(...prompts.map((prompt, i) => {
    const [item, button, words, key] = ['li', 'button', 'span', 'kbd'].map((tag) => document.createElement(tag));
    button.type = 'button';
    key.textContent = i + 1;
    words.append(key, ` ${prompt}`);
    button.append(words);
    button.onclick = () => onChoice(i);
    item.append(button);
    return item;
  }));
}

export function wireControls(actions) {
  const clicks = {
    pause: actions.togglePause, restart: actions.toFirst, live: actions.toNewest, fork: actions.forkHere, compare: actions.openComparison,
    camera: actions.toggleCamera, 'open-settings': () => $('settings').showModal(), 'open-help': () => $('help').showModal(),
    'start-anew': () => { $('settings').close(); actions.startAnew(); },
  };
  for (const [id, action] of Object.entries(clicks)) $(id).addEventListener('click', action);
  $('form').addEventListener('submit', (event) => {
    event.preventDefault();
    actions.submit();
  });
  $('problem').querySelector('button').onclick = () => { $('problem').hidden = true; };
  $('whole-pixels').onchange = refit;
  takeFile($('image'), actions.startFromPicture);
  takeFile($('import'), actions.playSchedule);
  $('files').addEventListener('click', ({ target }) => target.closest('a[href]') && ($('files').open = false));
  document.addEventListener('click', ({ target }) => target.closest('#files') || ($('files').open = false));
  listenToDrops(actions);
  listenToKeys(actions);
}

function takeFile(input, action) {
  input.onchange = () => {
    $('files').open = false;
    const [file] = input.files;
    if (file) action(file);
    input.value = ''; // the same one may be taken again
  };
}

function listenToDrops(actions) {
  const over = (on) => document.body.classList.toggle('dropping', on);
  addEventListener('dragover', (event) => { event.preventDefault(); over(true); });
  addEventListener('dragleave', (event) => event.relatedTarget ?? over(false));
  addEventListener('drop', (event) => {
    event.preventDefault();
    over(false);
    const file = event.dataTransfer.files[0];
    if (file) (/\.ya?ml$/.test(file.name) ? actions.playSchedule : actions.startFromPicture)(file);
  });
}

/** Keys, where nobody is typing and no dialog is open. */
function listenToKeys(actions) {
  const keys = {
    ' ': actions.togglePause, ArrowLeft: () => actions.lookBeside(-1), ArrowRight: () => actions.lookBeside(1),
    Home: actions.toFirst, End: actions.toNewest, f: actions.forkHere, c: actions.openComparison, d: actions.download,
    n: () => $('now').click(), i: () => $('image').click(), s: () => $('settings').showModal(), '?': () => $('help').showModal(),
  };
  addEventListener('keydown', (event) => {
    const { target } = event, typing = target.matches('input:not([type="checkbox"], [type="file"]), select');
    if (event.key === 'Escape' && typing) return target.blur();
    if (typing || event.ctrlKey || event.metaKey || event.altKey || document.querySelector('dialog[open]')) return;
    if (event.key === ' ' && target.matches('button, a, summary, label, input')) return; // it presses that
    const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
    const action = keys[key] ?? (/^[1-7]$/.test(key) ? () => actions.quick(+key - 1) : null);
    if (!action) return;
    event.preventDefault();
    action();
  });
}
