// What is known of the session: its chunks in a tree, and which branch is the video now.

export class Video {
  constructor() {
    this.clear();
  }

  clear() {
    this.chunks = new Map(); // by id
    this.tips = new Map([[0, null]]); // last chunk of every branch
    this.branch = 0;
    this.session = null;
    this.seed = null;
    this.fromCamera = this.fromImage = false;
  }

  /** The chunks of a branch, from the first on. */
  path(branch = this.branch) {
    const list = [];
    for (let id = this.tips.get(branch) ?? null; id !== null && this.chunks.has(id); id = this.chunks.get(id).parent) {
      list.unshift(this.chunks.get(id));
    }
    return list;
  }

  end(chunk) {
    return (chunk.start_frame + chunk.frames) / this.fps;
  }

  /** The chunk that is on screen at a time. */
  at(seconds) {
    return this.path().find((chunk) => seconds < this.end(chunk) - 1e-4);
  }

  add(chunk) {
    this.chunks.set(chunk.id, chunk);
    this.tips.set(chunk.branch, chunk.id);
  }

  cut({ branch, after, dropped }) {
    for (const id of dropped) this.chunks.delete(id);
    this.branch = branch;
    if (after === null || this.chunks.has(after)) this.tips.set(branch, after); // else it is on its way
  }

  /** Take what the server holds instead of what is known here; gives how far both are the same, in seconds. */
  load(values) {
    const before = this.path();
    const known = this.chunks;
    this.chunks = new Map(values.chunks.map((chunk) => [chunk.id, { ...known.get(chunk.id), ...chunk }]));
    this.tips = new Map(values.branches.map((entry) => [entry.branch, entry.tip]));
    this.branch = values.branch;
    this.seed = values.seed;
    [this.fromCamera, this.fromImage] = [values.from_camera, values.from_image];
    const after = this.path();
    const same = before.findIndex((chunk, i) => !after[i] || ['id', 'prompt', 'new_seed', 'frames'].some(
      (name) => (chunk[name] ?? null) !== (after[i][name] ?? null)));
    const shared = same < 0 ? before.length : same;
    return shared ? this.end(after[shared - 1]) : 0;
  }
}

/** Seconds up to which two paths are the same. */
export function sharedSeconds(video, path, other) {
  const ids = new Set(path.map((chunk) => chunk.id));
  const shared = other.filter((chunk) => ids.has(chunk.id)).at(-1);
  return shared ? video.end(shared) : 0;
}
