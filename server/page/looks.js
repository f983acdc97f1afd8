// Words on the page, and the size of the video on it.

const $ = (id) => document.getElementById(id);

/** The state of the video, in words. */
export function say(text) {
  if ($('status').textContent !== text) $('status').textContent = text;
}

/** What did not work; stays until it is dismissed or something else is tried. */
export function tellProblem(text) {
  $('problem').hidden = !text;
  const sentence = /^[a-z]+ /.test(text) ? text[0].toUpperCase() + text.slice(1) : text; // not the name of a setting
  $('problem').firstElementChild.textContent = sentence + (!sentence || sentence.endsWith('.') ? '' : '.');
}

/** Why the server has ended a connection, by its close code; or a video, by the code of the error. */
export const wordsOfClose = {
  1006: 'There is no connection to the server. Press Enter to try again.',
  1008: 'This page took too long to take the video. Press Enter to go on.',
  1011: 'There is no connection to the server. Press Enter to try again.',
  1013: 'The queue is full. Try again in a minute.',
  4408: 'Nothing happened for a while. Press Enter to go on.',
  4429: 'This page asked too much at once. Press Enter to go on.',
  disk: 'The server has no room for a video. Try again later.',
  failed: 'The server cannot go on with this video. Press Enter to try again.',
  taken_over: 'This video goes on in another window. Press Enter to have it here again.',
};

const SHARE_OF_HEIGHT = 0.52; // of the window, for the video
const fitted = new Map();
addEventListener('resize', refit);

/** Make a stage as large as there is room: where a small model is enlarged, by a whole number of pixels. */
export function fit(stage, model) {
  const width = model.width / model.pixel_scale, height = model.height / model.pixel_scale;
  fitted.set(stage, () => {
    const ratio = devicePixelRatio, room = stage.parentElement.clientWidth;
    const scale = Math.min(room / width, (innerHeight * SHARE_OF_HEIGHT) / height) * ratio;
    const whole = $('whole-pixels').checked && scale >= 2 ? Math.floor(scale + 1e-3) : scale;
    stage.style.width = `${(width * whole) / ratio}px`;
    stage.style.height = `${(height * whole) / ratio}px`;
    stage.classList.toggle('pixelated', scale >= 2);
  });
  refit();
}

/** After something that `fit` goes by has changed. */
export function refit() {
  fitted.forEach((resize) => resize());
}
