import { Player } from './player.js';

const $ = (id) => document.getElementById(id);
// What happened, with times in ms: shown nowhere, read by tests and by who looks for a fault.
const log = (window.wanLive = { events: [], frames: 0 });
const mark = (kind, more = {}) => log.events.push({ kind, t: performance.now(), ...more });

let socket, session, player, fps = 16, branch = 0, current = null, retries = 0, asked = 0;
const chunks = new Map(); // all of the session, by id
const tips = new Map([[0, null]]); // last chunk of every branch

const say = (text) => { if ($('status').textContent !== text) $('status').textContent = text; };
const send = (message) => socket?.readyState === WebSocket.OPEN && socket.send(JSON.stringify(message));
const end = (chunk) => (chunk.start_frame + chunk.frames) / fps;

function path(tip) {
  const list = [];
  for (let id = tip; id !== null && chunks.has(id); id = chunks.get(id).parent) list.unshift(chunks.get(id));
  return list;
}

function connect(start) {
  socket = new WebSocket(`${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}/v1/live`);
  socket.binaryType = 'arraybuffer';
  socket.onopen = () => socket.send(JSON.stringify(start));
  socket.onmessage = ({ data }) => {
    if (typeof data === 'string') return receive(JSON.parse(data));
    const length = new DataView(data).getUint32(0);
    receive(JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length))), data.slice(4 + length));
  };
  socket.onclose = ({ code }) => {
    mark('close', { code });
    if (session && [1001, 1006, 1012].includes(code) && retries < 30) {
      say('The connection was lost. Trying again…');
      setTimeout(() => connect({ type: 'start', resume: session }), Math.min(5000, 300 * 2 ** retries++));
    } else if (code === 1013) say('The queue is full. Try again in a minute.');
    else if (code === 4408) say('Nothing happened for a while. Press Enter to go on.');
    else if (code === 1006) say('There is no connection to the server.');
  };
}

const handlers = {
  hello(message) { fps = message.fps; },
  queued(message) { say(`All places are taken. You are number ${message.position} in the queue.`); },
  async started(message) {
    mark('started');
    retries = 0;
    const again = session === message.session || message.num_chunks > 0;
    session = log.session = message.session;
    sessionStorage.setItem('session', session);
    $('go').textContent = 'Change';
    $('download').hidden = false;
    say('Starting…');
    if (again) await catchUp();
  },
  chunk(message, body) {
    mark('chunk', { chunk: message.chunk });
    add({ ...message, id: message.chunk });
    tips.set(message.branch, message.chunk);
    if (message.branch === branch) player.push(message, body);
    draw();
    say(player.wantsPause ? 'Paused' : 'Live');
  },
  cut(message) {
    mark('cut', { after: message.after });
    for (const id of message.dropped) chunks.delete(id);
    branch = message.branch;
    if (message.after === null || chunks.has(message.after)) tips.set(branch, message.after); // else it is on its way
    player.cut(message.frame / fps);
    if (message.repeating) say(`Going back: ${message.repeating} chunks are made again…`);
    draw();
  },
  error(message) {
    mark('error', { code: message.code });
    say(message.message);
    if (message.code === 'bad_message' && !chunks.size) forget();
  },
};
const receive = (message, body) => handlers[message.type]?.(message, body);

function add(chunk) {
  chunks.set(chunk.id, chunk);
  log.chunks = chunks.size;
}

/** After a reload or a restart: what the server has and the page has not. */
async function catchUp() {
  const answer = await fetch(`/v1/sessions/${session}`);
  if (!answer.ok) return;
  const values = await answer.json();
  const missing = new Set(values.chunks.filter((chunk) => !chunks.has(chunk.id)).map((chunk) => chunk.id));
  values.chunks.forEach(add);
  tips.clear();
  values.branches.forEach((entry) => tips.set(entry.branch, entry.tip));
  branch = values.branch;
  const list = path(tips.get(branch));
  await show(list.filter((chunk) => missing.has(chunk.id)));
  if (list.length) send({ type: 'played', chunk: list.at(-1).id });
  draw();
}

/** Fetch chunks and give them to the player. */
async function show(list) {
  for (const chunk of list) {
    const answer = await fetch(`/v1/sessions/${session}/chunks/${chunk.id}.mp4`);
    if (!answer.ok) continue;
    const body = await answer.arrayBuffer();
    player.push({ ...chunk, codec: chunk.codec ?? codecOf(new Uint8Array(body)) }, body);
  }
}

function codecOf(bytes) {
  const at = bytes.findIndex((byte, i) => byte === 0x61 && bytes[i + 1] === 0x76 && bytes[i + 2] === 0x63 && bytes[i + 3] === 0x43);
  return 'avc1.' + [5, 6, 7].map((i) => bytes[at + i].toString(16).padStart(2, '0')).join('');
}

function forget() {
  session = undefined;
  sessionStorage.removeItem('session');
  $('go').textContent = 'Start';
}

function onFrame(seconds) {
  if (!log.frames++) mark('firstframe');
  const at = path(tips.get(branch)).find((chunk) => seconds < end(chunk) - 1e-4);
  if (at && at.id !== current) {
    current = at.id;
    mark('shown', { chunk: at.id, prompt: at.prompt });
    send({ type: 'played', chunk: at.id });
    for (const button of $('timeline').querySelectorAll('button')) {
      button.setAttribute('aria-current', String(+button.dataset.chunk === current));
    }
    figures();
  }
}

function draw() {
  const list = path(tips.get(branch));
  const buttons = new Map([...$('timeline').children].map((item) => [+item.dataset.chunk, item]));
  $('timeline').replaceChildren(...list.map((chunk, i) => buttons.get(chunk.id) ?? timelineItem(chunk, list[i - 1])));
  $('branches').replaceChildren(...(tips.size > 1 ? [...tips.keys()].map(branchButton) : []));
  $('download').href = `/v1/sessions/${session}/video.mp4?branch=${branch}`;
  figures();
}

function timelineItem(chunk, before) {
  const item = document.createElement('li'), button = document.createElement('button'), image = new Image();
  item.dataset.chunk = button.dataset.chunk = chunk.id;
  item.className = before && before.prompt !== chunk.prompt ? 'changed' : '';
  button.type = 'button';
  button.title = chunk.prompt;
  const place = `${(chunk.start_frame / fps).toFixed(1)} s`;
  button.setAttribute('aria-label', `Go on from ${place}: ${chunk.prompt}`);
  image.alt = '';
  image.src = `/v1/sessions/${session}/chunks/${chunk.id}.webp`;
  button.append(image, place);
  button.onclick = () => fork(chunk.id);
  item.append(button);
  return item;
}

function branchButton(number) {
  const button = document.createElement('button');
  button.type = 'button';
  button.textContent = `Branch ${number + 1}`;
  button.setAttribute('aria-current', String(number === branch));
  button.onclick = () => number !== branch && turnTo(number);
  return button;
}

/** The chunk that is left stays; what comes next is new, also where the prompt is not. */
function fork(id) {
  mark('fork', { chunk: id });
  const prompt = $('prompt').value.trim();
  send({ type: 'fork', chunk: id, ...(prompt && { prompt }), seed: Math.floor(Math.random() * 2 ** 32) });
}

async function turnTo(number) {
  const before = new Set(path(tips.get(branch)).map((chunk) => chunk.id));
  const other = path(tips.get(number)), shared = other.filter((chunk) => before.has(chunk.id)).at(-1);
  branch = number;
  player.cut(shared ? end(shared) : 0);
  await show(other.filter((chunk) => !before.has(chunk.id)));
  send({ type: 'fork', chunk: tips.get(number) });
  draw();
}

function figures() {
  const newest = chunks.get(tips.get(branch)), shown = chunks.get(current);
  const rows = { chunks: path(tips.get(branch)).length };
  if (newest) rows.ahead = Math.max(0, newest.index - (shown?.index ?? -1));
  if (newest?.timings) {
    const ms = (seconds) => `${Math.round(seconds * 1000)} ms`;
    Object.assign(rows, { step: ms(newest.step_s), denoise: ms(newest.timings.denoise_s),
      past: ms(newest.timings.clean_pass_s), decode: ms(newest.timings.decode_s), encode: ms(newest.encode_s) });
  }
  $('figures').replaceChildren(...Object.entries(rows).flatMap(([name, value]) => {
    const key = document.createElement('dt'), number = document.createElement('dd');
    key.textContent = name;
    number.textContent = value;
    return [key, number];
  }));
}

function togglePause() {
  if (!player) return;
  if (player.wantsPause) player.play();
  else player.pause();
  say(player.wantsPause ? 'Paused' : 'Live');
}

function look(step) {
  const list = path(tips.get(branch)), at = list.findIndex((chunk) => chunk.id === current) + step;
  if (list[at]) $('video').currentTime = list[at].start_frame / fps + 0.01;
}

function begin(start) {
  try {
    player ??= new Player($('video'), fps, onFrame, say);
  } catch (error) {
    say(error.message);
    return;
  }
  connect(start);
}

$('form').addEventListener('submit', (event) => {
  event.preventDefault();
  const prompt = $('prompt').value.trim();
  if (!prompt) return;
  mark('submit', { number: asked++ });
  if (socket?.readyState === WebSocket.OPEN && session) send({ type: 'prompt', prompt, playhead: player.time });
  else begin(session ? { type: 'start', resume: session } : { type: 'start', prompt });
});

addEventListener('keydown', (event) => {
  if (event.target.tagName === 'INPUT' || event.ctrlKey || event.metaKey || event.altKey) return;
  const onButton = ['BUTTON', 'A', 'SUMMARY'].includes(event.target.tagName);
  if (event.key === ' ' && !onButton) { event.preventDefault(); togglePause(); }
  else if (event.key === 'ArrowLeft') look(-1);
  else if (event.key === 'ArrowRight') look(1);
  else if (event.key === 'f' && current !== null) fork(current);
  else if (event.key === 'd' && session) $('download').click();
});

const earlier = sessionStorage.getItem('session');
if (earlier) begin({ type: 'start', resume: earlier });
