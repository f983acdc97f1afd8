// Plays chunks, each a whole little mp4, through MediaSource: placed by its first frame, cut and replaced at will.

const KEPT_S = 10; // of what was played, when the browser's buffer is full

export class Player {
  /** onFrame(seconds) is called for every frame that is shown. */
  constructor(video, fps, onFrame, onProblem) {
    Object.assign(this, { video, fps, onFrame, onProblem, jobs: [], buffer: null, wantsPause: false });
    const Source = window.ManagedMediaSource ?? window.MediaSource;
    if (!Source) throw new Error('this browser cannot play live video (it has no MediaSource)');
    if (window.ManagedMediaSource) video.disableRemotePlayback = true;
    this.source = new Source();
    this.opened = new Promise((done) => this.source.addEventListener('sourceopen', done, { once: true }));
    video.src = URL.createObjectURL(this.source);
    const shown = (now, frame) => {
      this.onFrame(frame.mediaTime);
      video.requestVideoFrameCallback(shown);
    };
    video.requestVideoFrameCallback(shown);
  }

  get time() {
    return this.video.currentTime;
  }

  async push(chunk, body) {
    this.jobs.push({ at: chunk.start_frame / this.fps, body });
    if (!this.buffer && !this.opening) {
      this.opening = true;
      await this.opened;
      const type = `video/mp4; codecs="${chunk.codec}"`;
      if (!(window.ManagedMediaSource ?? window.MediaSource).isTypeSupported(type)) {
        this.onProblem('This browser has no H.264 decoder. Try another one, or install its codecs.');
        return;
      }
      this.buffer = this.source.addSourceBuffer(type);
      this.buffer.mode = 'segments';
      this.buffer.addEventListener('updateend', () => this.work());
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
      if (this.time > job.cut) this.video.currentTime = job.cut;
      const held = this.buffer.buffered;
      if (held.length && held.end(held.length - 1) > job.cut) this.buffer.remove(job.cut, Infinity);
      else this.work();
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

  play() {
    this.wantsPause = false;
    this.video.play().catch(() => {});
  }

  pause() {
    this.wantsPause = true;
    this.video.pause();
  }
}
