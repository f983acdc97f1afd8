// The WebSocket: messages in and out, and coming back when it is lost. The Python client comes back by the same rules.

const LOST = [1001, 1005, 1006, 1011, 1012];
const MOST_RETRIES = 60;
const FIRST_WAIT_MS = 250;
const MOST_WAIT_MS = 4000;

export class Connection {
  /** receive(message, body), lost(), ended(code), resume() gives the message to come back with, or null. */
  constructor({ receive, lost, ended, resume }) {
    Object.assign(this, { receive, lost, ended, resume, socket: null, retries: 0, heard: 0 });
    addEventListener('online', () => this.socket === null && this.timer && this.again());
  }

  get open() {
    return this.socket?.readyState === WebSocket.OPEN;
  }

  start(message) {
    this.leave();
    const socket = this.socket = new WebSocket(`${location.protocol === 'https:' ? 'wss' : 'ws'}://${location.host}/v1/live`);
    socket.binaryType = 'arraybuffer';
    socket.onopen = () => socket.send(JSON.stringify(message));
    socket.onmessage = ({ data }) => {
      this.heard = performance.now();
      if (typeof data === 'string') return this.receive(JSON.parse(data));
      const length = new DataView(data).getUint32(0);
      this.receive(JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length))), data.slice(4 + length));
    };
    socket.onclose = ({ code }) => socket === this.socket && this.closed(code);
  }

  closed(code) {
    this.socket = null;
    if (!LOST.includes(code) || !this.resume() || this.retries >= MOST_RETRIES) return this.ended(code);
    this.lost();
    this.timer = setTimeout(() => this.again(), Math.min(MOST_WAIT_MS, FIRST_WAIT_MS * 2 ** this.retries++));
  }

  again() {
    const message = this.resume();
    if (message) this.start(message);
  }

  /** The network says nothing of a connection that it has lost: whoever has waited too long calls this. */
  giveUp() {
    const socket = this.socket;
    if (!socket) return;
    socket.onclose = null;
    socket.close();
    this.closed(1006);
  }

  send(message) {
    if (this.open) this.socket.send(JSON.stringify(message));
    return this.open;
  }

  /** Bytes that may be dropped: a frame of the camera. Gives whether they went out. */
  sendBytes(bytes) {
    if (!this.open || this.socket.bufferedAmount > 0) return false;
    this.socket.send(bytes);
    return true;
  }

  /** Without forgetting the video. */
  leave() {
    clearTimeout(this.timer);
    this.timer = null;
    const socket = this.socket;
    this.socket = null;
    socket?.close(1000);
  }
}
