// The settings that a viewer may choose, as the server describes them, and how the page looks.

const $ = (id) => document.getElementById(id);
const NAMES = { window_frames: 'window', sink_frames: 'sink', num_inference_steps: 'steps', switch_policy: 'prompt change',
  strength: 'camera strength' };

export class SettingsPanel {
  /** onChange(settings): what a video under way shall change. */
  constructor(settings, { onChange }) {
    this.settings = settings;
    this.touched = new Map(); // by name, what was chosen here
    for (const setting of settings) this.addField(setting, onChange);
    $('colours').value = localStorage.getItem('colours') ?? '';
    $('colours').onchange = () => this.useColours();
    this.useColours();
  }

  addField(setting, onChange) {
    const label = document.createElement('label'), about = document.createElement('p');
    const field = document.createElement(setting.choices ? 'select' : 'input');
    field.id = `setting-${setting.name}`;
    about.id = `about-${setting.name}`;
    label.htmlFor = field.id;
    label.textContent = NAMES[setting.name] ?? setting.name;
    label.title = setting.name;
    field.setAttribute('aria-describedby', about.id);
    if (setting.choices) field.append(...setting.choices.map((choice) => new Option(choice)));
    else Object.assign(field, { type: 'number', min: setting.least ?? 0.05, max: setting.most ?? 1, step: setting.least === null ? 0.05 : 1 });
    field.value = setting.value ?? (setting.name === 'strength' ? 0.75 : '');
    const when = document.createElement('b');
    when.textContent = setting.changeable ? 'Also while it plays. ' : 'Next start. ';
    about.append(when, setting.meaning);
    field.onchange = () => {
      if (!field.reportValidity()) return;
      this.touched.set(setting.name, setting.choices ? field.value : field.valueAsNumber);
      if (setting.changeable) onChange({ [setting.name]: this.touched.get(setting.name) });
    };
    $('fields').append(label, field, about);
  }

  /** Chosen settings for a start. */
  atStart(camera) {
    return Object.fromEntries([...this.touched].filter(([name]) => camera || name !== 'strength'));
  }

  /** Of those, what a video under way can take. */
  whilePlaying() {
    const names = this.settings.filter((setting) => setting.changeable).map((setting) => setting.name);
    return Object.fromEntries([...this.touched].filter(([name]) => names.includes(name)));
  }

  /** Show what a schedule asks for. */
  use(settings, seed) {
    for (const [name, value] of Object.entries(settings)) {
      $(`setting-${name}`).value = value;
      this.touched.set(name, value);
    }
    $('seed').value = seed ?? '';
  }

  get seed() {
    return $('seed').value === '' || !$('seed').checkValidity() ? null : $('seed').valueAsNumber;
  }

  offerSeed(seed) {
    $('keep-seed').disabled = seed === null;
    $('keep-seed').onclick = () => { $('seed').value = seed; };
  }

  useColours() {
    document.documentElement.dataset.colours = $('colours').value;
    localStorage.setItem('colours', $('colours').value);
  }
}
