// Two branches side by side, at the same time of the video.

import { newPlayer } from './player.js';
import { branchName } from './timeline_view.js';

const APART_S = 0.12;

export class Comparison {
  /** fetchChunk(chunk, kind) gives its bytes. */
  constructor(dialog, video, fetchChunk, fit) {
    Object.assign(this, { dialog, video, fetchChunk, fit, sides: [] });
    this.slider = dialog.querySelector('input[type="range"]');
    this.button = dialog.querySelector('#comparison-play');
    this.button.onclick = () => this.setPaused(!this.paused);
    this.slider.oninput = () => this.seek(+this.slider.value);
    dialog.addEventListener('close', () => this.end());
  }

  open() {
    const branches = [...this.video.tips.keys()], other = branches.filter((branch) => branch !== this.video.branch).at(-1);
    this.dialog.showModal();
    this.sides = [...this.dialog.querySelectorAll('figure')].map((figure, i) => {
      const select = figure.querySelector('select');
      select.replaceChildren(...branches.map((branch) => new Option(branchName(this.video, branch), branch)));
      select.value = i ? this.video.branch : other;
      const side = { figure, select };
      select.onchange = () => this.load(side);
      return side;
    });
    this.setPaused(false);
    this.sides.forEach((side) => this.load(side));
    this.timer = setInterval(() => this.together(), 100);
  }

  async load(side) {
    side.player?.destroy();
    const branch = +side.select.value, path = side.path = this.video.path(branch), caption = side.figure.querySelector('figcaption');
    const player = side.player = newPlayer(side.figure.querySelector('.stage'), this.video.fps, branchName(this.video, branch), (seconds) => {
      const chunk = path.find((part) => seconds < this.video.end(part) - 1e-4);
      if (chunk && caption.textContent !== chunk.prompt) caption.textContent = chunk.prompt;
      side.shown = seconds;
    });
    this.fit(side.figure.querySelector('.stage'));
    side.length = path.length ? this.video.end(path.at(-1)) : 0;
    this.slider.max = Math.max(...this.sides.map((one) => one.length ?? 0));
    this.seek(0);
    for (const chunk of path) {
      const body = await this.fetchChunk(chunk, player.kind);
      if (side.player !== player) return;
      if (body) player.push(chunk, body);
      if (this.paused) player.pause();
    }
  }

  seek(seconds) {
    for (const side of this.sides) side.player?.seek(Math.min(seconds, Math.max(0, side.length - 1 / this.video.fps)));
  }

  setPaused(paused) {
    this.paused = paused;
    this.button.textContent = paused ? 'Play' : 'Pause';
    for (const side of this.sides) side.player?.[paused ? 'pause' : 'play']();
  }

  /** Neither runs ahead of the other; both begin again where the longer one ends. */
  together() {
    const [one, other] = this.sides;
    if (!one.player || !other.player) return;
    const times = [one, other].map((side) => side.player.time), furthest = Math.max(...times);
    this.slider.value = furthest;
    if (this.paused) return;
    if (furthest > this.slider.max - 1.5 / this.video.fps) return this.seek(0);
    [one, other].forEach((side, i) => {
      const behind = Math.min(times[1 - i], side.length - 1 / this.video.fps);
      if (times[i] < behind - APART_S) side.player.seek(behind);
    });
  }

  end() {
    clearInterval(this.timer);
    this.sides.forEach((side) => side.player?.destroy());
    this.sides = [];
  }
}
