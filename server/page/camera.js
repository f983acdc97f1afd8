// The webcam as the source of a video: frames of the model's size, as images, and none that has to wait.

const MOST_BYTES = 60_000; // the server takes messages of 64 KiB

export class Camera {
  /** send(bytes) says whether a frame went out; one that did not is not sent again. */
  constructor(view, { width, height, fps, send }) {
    Object.assign(this, { view, fps, send, sent: 0, dropped: 0, quality: 0.9, busy: false });
    this.canvas = new OffscreenCanvas(width, height);
    this.context = this.canvas.getContext('2d');
  }

  /** Asks for the camera. Throws an error in words. */
  async start() {
    if (!navigator.mediaDevices) throw new Error('The camera can be used on https:// and on this machine only.');
    try {
      this.stream = await navigator.mediaDevices.getUserMedia({ video: { width: 640, frameRate: this.fps }, audio: false });
    } catch (error) {
      throw new Error(error.name === 'NotAllowedError' ? 'The camera was not allowed.' : `There is no camera to use: ${error.message}`);
    }
    this.view.srcObject = this.stream;
    this.view.hidden = false;
    await this.view.play();
    this.timer = setInterval(() => this.take(), 1000 / this.fps);
  }

  async take() {
    const { videoWidth, videoHeight } = this.view;
    if (!videoWidth) return;
    if (this.busy) return this.dropped++;
    this.busy = true;
    const { width, height } = this.canvas, scale = Math.max(width / videoWidth, height / videoHeight);
    const [w, h] = [width / scale, height / scale];
    this.context.drawImage(this.view, (videoWidth - w) / 2, (videoHeight - h) / 2, w, h, 0, 0, width, height);
    const image = await this.canvas.convertToBlob({ type: 'image/jpeg', quality: this.quality });
    if (image.size > MOST_BYTES) this.quality = Math.max(0.2, this.quality - 0.1);
    else if (this.send(await image.arrayBuffer())) this.sent++;
    else this.dropped++;
    this.busy = false;
  }

  stop() {
    clearInterval(this.timer);
    this.stream?.getTracks().forEach((track) => track.stop());
    this.view.srcObject = null;
    this.view.hidden = true;
  }
}
