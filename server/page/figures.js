// How the video comes along, in numbers.

const STAGES = [['denoise_s', 'denoise'], ['clean_pass_s', 'past'], ['decode_s', 'decode'], ['encode_s', 'encode']];

export class Figures {
  constructor(rows, stages, names, video, model) {
    Object.assign(this, { rows, stages, names, video, model });
    this.clear();
    this.draw(null);
  }

  clear() {
    Object.assign(this, { asked: null, first: null, shownAt: [], bytes: 0, arrivals: [] });
  }

  /** Enter was pressed on a new video. */
  begin() {
    this.clear();
    this.asked = performance.now();
  }

  frame() {
    const now = performance.now();
    this.first ??= now;
    this.shownAt.push(now);
    while (this.shownAt[0] < now - 2000) this.shownAt.shift();
  }

  chunk(message, bytes) {
    this.bytes += bytes;
    this.arrivals.push({ bytes, frames: message.frames });
    if (this.arrivals.length > 8) this.arrivals.shift();
  }

  draw(current) {
    const path = this.video.path(), newest = path.at(-1), ms = (seconds) => `${Math.round(seconds * 1000)} ms`;
    const { width, height, pixel_scale: scale, fps } = this.model;
    const rows = { model: this.model.model, picture: `${width / scale} × ${height / scale}, ${fps}/s` };
    if (newest?.preview) rows['shown at once'] = 'a preview';
    if (this.shownAt.length > 1) {
      const span = (this.shownAt.at(-1) - this.shownAt[0]) / 1000;
      rows['shown'] = `${((this.shownAt.length - 1) / span).toFixed(1)} frames/s`;
    }
    if (newest?.step_s && !newest.preview) rows['can be made'] = `${(newest.frames / (newest.step_s + newest.encode_s)).toFixed(1)} frames/s`;
    if (this.first && this.asked) rows['first frame'] = ms((this.first - this.asked) / 1000);
    if (newest) {
      rows['length'] = `${this.video.end(newest).toFixed(1)} s, ${count(path.length)}`;
      rows['made ahead'] = count(Math.max(0, newest.index - (this.video.chunks.get(current)?.index ?? -1)));
    }
    if (this.bytes) {
      const seconds = this.arrivals.reduce((sum, part) => sum + part.frames, 0) / this.video.fps;
      rows['received'] = `${size(this.bytes)}, ${size(this.arrivals.reduce((sum, part) => sum + part.bytes, 0) / seconds)}/s`;
    }
    if (this.video.seed !== null) rows['seed'] = this.video.seed;
    if (newest?.step_s) rows['step'] = ms(newest.step_s + newest.encode_s);
    this.rows.replaceChildren(...Object.entries(rows).flatMap(([name, value]) => [element('dt', name), element('dd', value)]));
    if (!newest) for (const part of [this.stages, this.names]) part.replaceChildren();
    if (newest?.timings) this.drawStages(newest, ms);
  }

  drawStages(chunk, ms) {
    const more = { encode_s: chunk.encode_s, decode_s: chunk.timings.preview_s ?? 0 };
    const seconds = STAGES.map(([key]) => (chunk.timings[key] ?? 0) + (more[key] ?? 0));
    const words = STAGES.map(([, name], i) => `${name} ${ms(seconds[i])}`);
    this.stages.replaceChildren(...seconds.map((part, i) => {
      const bar = dot(i);
      bar.style.flex = `${1000 * part} 0 0`;
      return bar;
    }));
    this.stages.setAttribute('aria-label', `Stages of a step: ${words.join(', ')}`);
    this.names.replaceChildren(...words.map((text, i) => {
      const span = element('span', '');
      span.append(dot(i), text);
      return span;
    }));
  }
}

function dot(number) {
  const made = element('i', '');
  made.className = `stage-${number + 1}`;
  return made;
}

function element(tag, text) {
  const made = document.createElement(tag);
  made.textContent = text;
  return made;
}

function count(chunks) {
  return `${chunks} ${chunks === 1 ? 'chunk' : 'chunks'}`;
}

function size(bytes) {
  return bytes < 1e6 ? `${Math.round(bytes / 1000)} kB` : `${(bytes / 1e6).toFixed(1)} MB`;
}
