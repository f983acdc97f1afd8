// The page: what is pressed becomes messages, what the server says becomes video.

import { Camera } from './camera.js';
import { Comparison } from './comparison.js';
import { Connection } from './connection.js';
import { drawControls, offerPrompts, wireControls } from './controls.js';
import { Figures } from './figures.js';
import { fit, say, tellProblem, wordsOfClose } from './looks.js';
import { newPlayer } from './player.js';
import { SettingsPanel } from './settings_panel.js';
import { TimelineView } from './timeline_view.js';
import { readSchedule, sendPicture } from './uploads.js';
import { sharedSeconds, Video } from './video.js';

const $ = (id) => document.getElementById(id);
const MOST_SILENCE_MS = 12_000;
// What happened, with times in ms: shown nowhere, read by tests and by who looks for a fault.
const log = (window.wanLive = { events: [], frames: 0 });
const mark = (kind, more = {}) => log.events.push({ kind, t: performance.now(), ...more });

const model = await (await fetch('/v1/model')).json();
const video = new Video();
video.fps = model.fps;
const figures = new Figures($('figures'), $('stages'), $('stage-names'), video, model);
const timeline = new TimelineView($('timeline'), $('branches'), video, { onChunk: fork, onBranch: turnTo });
const settings = new SettingsPanel(model.settings, { onChange: (changed) => connection.send({ type: 'settings', settings: changed }) });
const comparison = new Comparison($('comparison'), video, fetchChunk, (stage) => fit(stage, model));
const connection = new Connection({
  receive: (message, body) => handlers[message.type]?.(message, body),
  lost: () => { mark('lost'); say('The connection was lost. Trying again…'); },
  ended,
  resume: () => video.session && { type: 'start', resume: video.session, transport: player.kind },
});
let player, camera, current = null, number = 0;
let queued = false; // for a slot
let quiet = false; // the server has said that nothing more comes
let promptForLater = null; // what was asked for while there was no connection
let scheduleBefore = null; // that waits for its picture
let sessionBefore = null; // that was left for one which has not begun yet

const handlers = {
  queued({ position }) { mark('queued'); queued = true; say(`All places are taken. You are number ${position} in the queue.`); },
  async started(message) {
    mark('started');
    connection.retries = 0;
    queued = quiet = false;
    sessionBefore = null;
    const again = video.session === message.session || message.num_chunks > 0;
    video.session = log.session = message.session;
    video.seed = message.seed;
    settings.offerSeed(message.seed);
    sessionStorage.setItem('session', message.session);
    say('Starting…');
    if (again) await catchUp();
    if (promptForLater && promptForLater !== video.path().at(-1)?.prompt) connection.send({ type: 'prompt', prompt: promptForLater });
    promptForLater = null;
    draw();
  },
  chunk(message, body) {
    mark('chunk', { chunk: message.chunk });
    const held = video.chunks.has(message.chunk) && player.holds(message.start_frame / video.fps);
    video.add({ ...message, id: message.chunk });
    figures.chunk(message, body.byteLength);
    log.chunks = video.chunks.size;
    if (message.branch === video.branch && !held) player.push(message, body);
    draw();
    say(player.wantsPause ? 'Paused' : 'Live');
  },
  cut(message) {
    mark('cut', { after: message.after });
    video.cut(message);
    player.cut(message.frame / video.fps);
    if (message.near) say('Going back, to a past that is near to what it was…');
    else if (message.repeating) say(`Going back: ${message.repeating} chunks are made again…`);
    draw();
  },
  error(message) {
    mark('error', { code: message.code });
    tellProblem(message.message);
    quiet ||= message.code === 'limit';
    if (!['failed', 'taken_over', 'disk'].includes(message.code)) return;
    connection.leave(); // the server takes nothing more on it
    ended(message.code);
  },
};

function ended(code) {
  mark('close', { code });
  queued = false;
  stopCamera();
  say(wordsOfClose[code] ?? (video.chunks.size ? 'This video has ended. Press Enter for a new one.' : 'Type a prompt and press Enter.'));
  if (code === 4400) {
    forget();
    if (sessionBefore) return begin({ resume: sessionBefore }, $('problem').firstElementChild.textContent);
  }
  draw();
}

/** The server goes on with another video, or with none; what is here can still be watched. */
function forget() {
  sessionStorage.removeItem('session');
  video.session = null;
}

/** After a reload or a restart: what the server has and the page has not. */
async function catchUp() {
  const answer = await fetch(`/v1/sessions/${video.session}`);
  if (!answer.ok) return;
  player.cut(video.load(await answer.json()));
  const list = video.path();
  await show(list);
  if (list.length) connection.send({ type: 'played', chunk: list.at(-1).id });
}

async function fetchChunk(chunk, kind) {
  const answer = await fetch(`/v1/sessions/${video.session}/chunks/${chunk.id}.${kind}`);
  return answer.ok ? answer.arrayBuffer() : null;
}

/** Give the player the chunks of a list that it does not hold; of what is seen again not the preview any more. */
async function show(list) {
  const [session, branch] = [video.session, video.branch];
  for (const chunk of list) {
    const isPreview = chunk.preview && chunk.wasShown;
    if (player.holds(chunk.start_frame / video.fps) && !isPreview) continue;
    const body = await fetchChunk(chunk, player.kind);
    if (session !== video.session || branch !== video.branch) return;
    if (!body) continue;
    chunk.preview = false;
    player.push(chunk, body);
  }
}

function onFrame(seconds) {
  const chunk = video.at(seconds);
  if (!chunk) return; // of what was there before
  if (!log.frames++) mark('firstframe');
  figures.frame();
  if (chunk.id === current) return;
  current = chunk.id;
  mark('shown', { chunk: chunk.id, prompt: chunk.prompt });
  connection.send({ type: 'played', chunk: chunk.id });
  timeline.mark(current);
  figures.draw(current);
  const path = video.path(), at = path.indexOf(chunk);
  show(path.slice(at, at + 3)); // what the player had to give up may come again
  chunk.wasShown = true;
}

function draw() {
  timeline.draw();
  timeline.mark(current);
  figures.draw(current);
  drawControls({ video, going: connection.open && Boolean(video.session || queued), paused: player?.wantsPause, camera });
}

/** The chunk that is left stays; what comes next is new, also where nothing else is. */
function fork(id) {
  const next = video.path().find((chunk) => chunk.parent === id), prompt = $('prompt').value.trim();
  mark('fork', { chunk: id });
  const seed = next?.prompt === prompt ? { seed: Math.floor(Math.random() * 2 ** 32) } : {};
  const message = { type: 'fork', chunk: id, ...(prompt && { prompt }), ...seed, settings: settings.whilePlaying() };
  if (!connection.send(message)) tellProblem('There is no connection to the server just now.');
}

async function turnTo(branch) {
  const before = video.path();
  video.branch = branch;
  player.cut(sharedSeconds(video, before, video.path()));
  connection.send({ type: 'fork', chunk: video.tips.get(branch) });
  draw();
  await show(video.path());
}

function togglePause() {
  if (!player) return;
  if (player.wantsPause) player.play();
  else player.pause();
  say(player.wantsPause ? 'Paused' : 'Live');
  draw();
}

async function look(chunk, after = 0.01) {
  if (!chunk) return;
  await show([chunk]);
  player.seek(chunk.start_frame / video.fps + after);
}

function lookBeside(step) {
  const path = video.path();
  look(path[path.findIndex((chunk) => chunk.id === current) + step]);
}

/** A new video; the one before stays on the server for a while. */
function begin(start, problem = '') {
  mark('submit', { number: number++ });
  connection.leave();
  sessionBefore = start.resume ? null : video.session;
  video.clear();
  video.fromCamera = Boolean(start.camera);
  current = null;
  log.frames = 0;
  figures.begin();
  player?.destroy();
  player = newPlayer($('stage'), video.fps, 'The video', onFrame);
  tellProblem(problem);
  say('Connecting…');
  connection.start({ type: 'start', transport: player.kind, ...start });
  draw();
}

/** A start message of what the page says. */
function asked(more = {}) {
  const seed = settings.seed;
  return { prompt: $('prompt').value.trim(), settings: settings.atStart(more.camera), ...(seed !== null && { seed }), ...more };
}

function submit() {
  const prompt = $('prompt').value.trim();
  if (!prompt) return;
  if (connection.open && (video.session || queued)) {
    mark('submit', { number: number++ });
    tellProblem('');
    connection.send({ type: 'prompt', prompt, ...($('now').checked && { playhead: player.time }) });
  } else if (video.session && !video.fromCamera) {
    promptForLater = prompt;
    connection.start(connection.resume());
  } else begin(asked());
}

async function startFromPicture(file) {
  const image = await sendPicture(file, model), schedule = scheduleBefore ?? {};
  scheduleBefore = null;
  stopCamera();
  begin(asked({ image, ...schedule }));
}

async function playSchedule(file) {
  const { prompt, prompt_changes: changes, seed, settings: chosen, image } = await readSchedule(file);
  $('prompt').value = prompt;
  settings.use(chosen, seed);
  scheduleBefore = changes && { prompt_changes: changes };
  if (image) throw new Error(`This schedule starts from a picture: now give ${image}.`);
  stopCamera();
  begin(asked(scheduleBefore));
  scheduleBefore = null;
}

async function toggleCamera() {
  if (camera) return stopCamera();
  const size = { width: model.width / model.pixel_scale, height: model.height / model.pixel_scale };
  const made = new Camera($('camera-view'), { ...size, fps: model.fps, send: (bytes) => video.session && connection.sendBytes(bytes) });
  await made.start();
  camera = log.camera = made;
  begin(asked({ camera: true, ahead: 1 }));
}

function stopCamera() {
  camera?.stop();
  camera = null;
  draw();
}

/** Actions whose errors are told on the page. */
function inWords(actions) {
  const told = (action) => (...values) => action(...values).catch((error) => tellProblem(error.message));
  return Object.fromEntries(Object.entries(actions).map(([name, action]) => [name, told(action)]));
}

function setQuick(index) {
  $('prompt').value = model.quick_prompts[index];
  submit();
}

function download() {
  for (const id of ['download', 'making']) if ($(id).href) $(id).click();
}

function openComparison() {
  if ($('compare').disabled) return;
  if (!player.wantsPause) togglePause();
  comparison.open();
}

/** Browsers that ran dry often wait for more than the server makes ahead: begin where they stand, and let it make more. */
function lookForStall() {
  const stands = player && !player.wantsPause && !document.hidden && player.time === lookForStall.time;
  lookForStall.time = player?.time;
  const chunk = stands && player.holds(player.time) && video.at(player.time + 1 / video.fps);
  if (!chunk) return;
  mark('stall');
  player.seek(player.time);
  connection.send({ type: 'played', chunk: chunk.id });
}

/** A network that is lost says nothing: whoever waits much longer than a chunk takes asks anew. */
function lookForSilence() {
  const path = video.path(), dry = path.length && path.at(-1).id === current;
  const patience = MOST_SILENCE_MS + 4000 * (path.at(-1)?.step_s ?? 0);
  if (dry && !quiet && !camera && !document.hidden && performance.now() - connection.heard > patience) connection.giveUp();
}

wireControls({
  submit, togglePause, lookBeside, download, openComparison,
  ...inWords({ toggleCamera, startFromPicture, playSchedule }),
  quick: setQuick,
  toFirst: () => look(video.path()[0], 0),
  toNewest: () => look(video.path().at(-1)),
  forkHere: () => !$('fork').disabled && fork(current),
  startAnew: () => { stopCamera(); begin(asked()); },
});
setInterval(lookForSilence, 1000);
setInterval(lookForStall, 1500);
$('prompt').maxLength = model.max_prompt_length;
$('prompt').value = model.quick_prompts[0];
offerPrompts(model.quick_prompts, setQuick);
fit($('stage'), model);
$('go').disabled = false; // before, Enter would send the form away
const earlier = sessionStorage.getItem('session');
if (earlier) begin({ resume: earlier });
