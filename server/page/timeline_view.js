// The chunks as a row of pictures, and the branches as tabs.

export class TimelineView {
  constructor(list, tabs, video, { onChunk, onBranch }) {
    Object.assign(this, { list, tabs, video, onChunk, onBranch });
  }

  draw() {
    const path = this.video.path();
    const items = new Map([...this.list.children].map((item) => [item.dataset.key, item]));
    const wasAtEnd = this.list.scrollLeft + this.list.clientWidth > this.list.scrollWidth - 90;
    this.list.replaceChildren(...path.map((chunk, i) => items.get(this.key(chunk)) ?? this.item(chunk, path[i - 1])));
    if (wasAtEnd) this.list.scrollLeft = this.list.scrollWidth;
    const branches = [...this.video.tips.keys()];
    this.tabs.replaceChildren(...(branches.length > 1 ? branches.map((branch) => this.tab(branch)) : []));
  }

  /** Show which chunk is on screen. */
  mark(id) {
    for (const button of this.list.querySelectorAll('button')) {
      button.setAttribute('aria-current', String(+button.dataset.chunk === id));
    }
  }

  key(chunk) {
    return `${this.video.session}/${chunk.id}/${chunk.prompt}`;
  }

  item(chunk, before) {
    const item = document.createElement('li'), button = document.createElement('button'), image = new Image();
    item.dataset.key = this.key(chunk);
    button.dataset.chunk = chunk.id;
    item.className = before && before.prompt !== chunk.prompt ? 'changed' : '';
    button.type = 'button';
    button.title = chunk.prompt;
    const place = `${(chunk.start_frame / this.video.fps).toFixed(1)} s`;
    button.setAttribute('aria-label', `Go on from ${place}: ${chunk.prompt}`);
    image.alt = '';
    image.src = `/v1/sessions/${this.video.session}/chunks/${chunk.id}.webp`;
    button.append(image, place);
    button.onclick = () => this.onChunk(chunk.id);
    item.append(button);
    return item;
  }

  tab(branch) {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = branchName(this.video, branch);
    button.setAttribute('aria-current', String(branch === this.video.branch));
    button.onclick = () => branch !== this.video.branch && this.onBranch(branch);
    return button;
  }
}

export function branchName(video, branch) {
  const path = video.path(branch);
  return `Branch ${branch + 1}, ${path.length ? video.end(path.at(-1)).toFixed(1) : 0} s`;
}
