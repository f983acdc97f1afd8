// Plays chunks, each a whole little mp4, through MediaSource: placed by its first frame, cut and replaced at will.
// Browsers without H.264 get an ImagePlayer, which does the same on a canvas.

import { ImagePlayer } from './image_player.js';

const KEPT_S = 10; // of what was played, when the browser's buffer is full
const USUAL_CODEC = 'video/mp4; codecs="avc1.64001f"';
const Source = () => window.ManagedMediaSource ?? window.MediaSource;

/** The player that this browser can have, in an element. `?player=images` asks for the other one. */
export function newPlayer(stage, fps, label, onFrame) {
  const images = new URLSearchParams(location.search).get('player') === 'images' || !Source()?.isTypeSupported(USUAL_CODEC);
  return new (images ? ImagePlayer : MediaPlayer)(stage, fps, label, onFrame);
}

class MediaPlayer {
  kind = 'mp4';

  /** onFrame(seconds) is called for every frame that is shown. */
  constructor(stage, fps, label, onFrame) {
    const video = document.createElement('video');
    Object.assign(video, { className: 'screen', muted: true, playsInline: true, disableRemotePlayback: true });
    video.setAttribute('aria-label', label);
    stage.append(video);
    Object.assign(this, { element: video, fps, jobs: [], buffer: null, wantsPause: false });
    this.source = new (Source())();
    this.opened = new Promise((done) => this.source.addEventListener('sourceopen', done, { once: true }));
    this.url = video.src = URL.createObjectURL(this.source);
    const shown = (now, frame) => {
      onFrame(frame.mediaTime);
      video.requestVideoFrameCallback(shown);
    };
    video.requestVideoFrameCallback(shown);
  }

  get time() {
    return this.element.currentTime;
  }

  /** Whether the chunk that begins then is here, or about to be. */
  holds(seconds) {
    const ranges = seconds < this.gone() - 1e-6 ? this.buffer?.buffered : null;
    for (let i = 0; i < (ranges?.length ?? 0); i++) {
      if (ranges.start(i) <= seconds + 0.02 && seconds + 0.02 < ranges.end(i)) return true;
    }
    return this.jobs.some((job) => job.body && Math.abs(job.at - seconds) < 1e-4);
  }

  /** From when on all that is in the buffer is about to be removed. */
  gone() {
    const cuts = [this.removing ?? Infinity, ...this.jobs.map((job) => job.cut ?? Infinity)];
    return Math.min(...cuts);
  }

  async push(chunk, body) {
    this.jobs.push({ at: chunk.start_frame / this.fps, body });
    if (!this.buffer && !this.opening) {
      this.opening = true;
      await this.opened;
      this.buffer = this.source.addSourceBuffer(`video/mp4; codecs="${codecOf(new Uint8Array(body))}"`);
      this.buffer.mode = 'segments';
      this.buffer.addEventListener('updateend', () => {
        this.removing = null;
        this.work();
      });
    }
    this.work();
  }

  /** What comes after `seconds` is another video from now on. */
  cut(seconds) {
    this.jobs = this.jobs.filter((job) => job.body && job.at < seconds - 1e-6);
    this.jobs.push({ cut: seconds });
    this.work();
  }

  work() {
    if (!this.buffer || this.buffer.updating || !this.jobs.length) return;
    const job = this.jobs.shift();
    if ('cut' in job) {
      if (this.time > job.cut) this.seek(job.cut);
      const held = this.buffer.buffered;
      if (held.length && held.end(held.length - 1) > job.cut) {
        this.removing = job.cut;
        this.buffer.remove(job.cut, Infinity);
      } else this.work();
      return;
    }
    this.buffer.timestampOffset = job.at;
    try {
      this.buffer.appendBuffer(job.body);
    } catch (error) {
      if (error.name !== 'QuotaExceededError') throw error;
      this.jobs.unshift(job);
      this.buffer.remove(0, Math.max(0.1, this.time - KEPT_S));
    }
    if (!this.wantsPause) this.play();
  }

  seek(seconds) {
    this.element.currentTime = seconds;
  }

  play() {
    this.wantsPause = false;
    this.element.play().catch(() => {});
  }

  pause() {
    this.wantsPause = true;
    this.element.pause();
  }

  destroy() {
    this.jobs = [];
    URL.revokeObjectURL(this.url);
    this.element.remove();
  }
}

/** What the avcC box of an mp4 says, `avc1.64001f` say. */
function codecOf(bytes) {
  const at = bytes.findIndex((byte, i) => byte === 0x61 && bytes[i + 1] === 0x76 && bytes[i + 2] === 0x63 && bytes[i + 3] === 0x43);
  return 'avc1.' + [5, 6, 7].map((i) => bytes[at + i].toString(16).padStart(2, '0')).join('');
}
