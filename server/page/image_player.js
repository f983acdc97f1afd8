// Plays chunks that come as images, one per frame, on a canvas: for browsers without H.264.

const MOST_BYTES = 64 * 2 ** 20; // of frames that are held; those farthest from the one on screen go first
const DECODED_AHEAD = 8;

export class ImagePlayer {
  kind = 'images';

  constructor(stage, fps, label, onFrame) {
    const canvas = document.createElement('canvas');
    canvas.className = 'screen';
    canvas.setAttribute('role', 'img');
    canvas.setAttribute('aria-label', label);
    stage.append(canvas);
    Object.assign(this, { element: canvas, fps, onFrame, frames: new Map(), pictures: new Map(), bytes: 0 });
    Object.assign(this, { context: canvas.getContext('2d'), clock: 0, drawn: -1, before: null, wantsPause: false });
    this.turn = requestAnimationFrame((now) => this.tick(now));
  }

  get time() {
    return this.clock;
  }

  holds(seconds) {
    return this.frames.has(Math.round(seconds * this.fps));
  }

  /** `body`: one image after the other, each after its length as a 32-bit number. */
  push(chunk, body) {
    const view = new DataView(body);
    for (let at = 0, frame = chunk.start_frame; at < body.byteLength; frame++) {
      const length = view.getUint32(at);
      this.drop(frame);
      this.frames.set(frame, new Blob([new Uint8Array(body, at + 4, length)]));
      this.bytes += length;
      at += 4 + length;
    }
    const far = [...this.frames.keys()].sort((a, b) => Math.abs(b - this.frame) - Math.abs(a - this.frame));
    while (this.bytes > MOST_BYTES) this.drop(far.shift());
  }

  cut(seconds) {
    const first = Math.round(seconds * this.fps);
    for (const frame of [...this.frames.keys()]) if (frame >= first) this.drop(frame);
    if (this.clock > seconds) this.seek(seconds);
  }

  seek(seconds) {
    this.clock = seconds;
    this.drawn = -1;
  }

  play() {
    this.wantsPause = false;
  }

  pause() {
    this.wantsPause = true;
  }

  destroy() {
    cancelAnimationFrame(this.turn);
    for (const frame of [...this.frames.keys()]) this.drop(frame);
    this.element.remove();
  }

  get frame() {
    return Math.floor(this.clock * this.fps + 1e-3);
  }

  drop(frame) {
    this.bytes -= this.frames.get(frame)?.size ?? 0;
    this.frames.delete(frame);
    this.forget(frame);
  }

  forget(frame) {
    this.pictures.get(frame)?.close?.();
    this.pictures.delete(frame);
  }

  tick(now) {
    this.turn = requestAnimationFrame((later) => this.tick(later));
    const passed = Math.min(0.1, (now - (this.before ?? now)) / 1000);
    this.before = now;
    this.unpack();
    const next = this.clock + (this.wantsPause || this.drawn < 0 ? 0 : passed);
    const picture = this.pictures.get(Math.floor(next * this.fps + 1e-3));
    if (!(picture instanceof ImageBitmap)) return; // not here yet: the clock waits for it
    this.clock = next;
    if (this.frame === this.drawn) return;
    this.drawn = this.frame;
    if (this.element.width !== picture.width || this.element.height !== picture.height) {
      Object.assign(this.element, { width: picture.width, height: picture.height });
    }
    this.context.drawImage(picture, 0, 0);
    this.onFrame(this.drawn / this.fps);
  }

  unpack() {
    const first = this.frame;
    for (const frame of this.pictures.keys()) if (frame < first || frame > first + DECODED_AHEAD) this.forget(frame);
    for (let frame = first; frame <= first + DECODED_AHEAD; frame++) {
      const blob = this.frames.get(frame);
      if (!blob || this.pictures.has(frame)) continue;
      this.pictures.set(frame, 'on its way');
      createImageBitmap(blob).then((picture) => {
        if (this.frames.get(frame) === blob && this.pictures.has(frame)) this.pictures.set(frame, picture);
        else picture.close();
      });
    }
  }
}
