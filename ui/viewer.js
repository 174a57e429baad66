/* The viewer of films: zoom, pan, window, overlays, measures, several films.

   One function body, run by the page once `element`, which holds the HTML of `viewer.SHELL`, is there; `trigger` tells
   the server something. What it shows comes as two events at the window, each with a JSON text made in viewer.py:
   `manet-films`, films whose values can now be fetched, as soon as the file is read; `manet-layers`, its mask and
   heatmaps, when the networks have answered. The latter does not move the view.

   A film is drawn by WebGL2, every pane by one call of one shader, which gets the values as 16-bit numbers: zoom,
   window and overlays are arithmetic at each pixel of the screen. Where no graphics processor does that, `Raster` does
   the same arithmetic, which is faster than WebGL2 in software. Coordinates: `film` pixels from the film's top left,
   `screen` CSS pixels from a pane's. The view is shared by all panes: the film's point in the middle, as shares of
   width and height, and a zoom relative to the whole film's fitting. */

const root = element.querySelector('.viewer');
const desk = element.closest('#desk') ?? root;
const find = selector => root.querySelector(selector);
const stage = find('.stage'), canvas = find('canvas'), marks = find('svg'), labels = find('.labels');
const COLOURS = Object.fromEntries(Object.entries(JSON.parse(root.dataset.colours))
  .map(([name, text]) => [name, Uint8Array.from(atob(text), letter => letter.charCodeAt(0))]));  // 256 × (r, g, b)
const ACCENT = [0.424, 0.773, 0.851];
const DIFFERENCE = root.dataset.difference;  // colours
const KEPT = Number(root.dataset.kept);  // films
const MOST_ZOOM = 64;  // CSS pixels for a pixel of the film

const films = new Map();  // key: film, the newest last
const look = {layout: 'film', mask: false, outline: false, heat: true, lungs: false, opacity: 0.6, colours: 'inferno',
  scale: 'own', tool: 'pan'};
const view = {x: 0.5, y: 0.5, zoom: 1};
const aside = new Set();  // films whose layers were asked for to be seen beside another
let shown = null, beside = null;  // films
let panes = [];

// --- films -----------------------------------------------------------------------------------------------------------

/** The film and ever smaller copies of it, each half as wide and high, {width, height, values: Uint16Array}. */
function pyramid(values, width, height) {
  const levels = [{values, width, height}];
  while (width > 128 && height > 128) {
    const [w, h, half] = [width >> 1, height >> 1, new Uint16Array((width >> 1) * (height >> 1))];
    for (let y = 0, out = 0; y < h; y++) {
      for (let x = 0, at = 2 * y * width; x < w; x++, at += 2) {
        half[out++] = (values[at] + values[at + 1] + values[at + width] + values[at + width + 1]) >> 2;
      }
    }
    [values, width, height] = [half, w, h];
    levels.push({values, width, height});
  }
  return levels;
}

/** A film that was just read; or, when the page was reloaded, all that it had. */
async function receiveFilms(text) {
  const {open: key, films: told} = JSON.parse(text);
  if (!told.length) {
    if (films.has(key) && films.get(key) !== shown) open(films.get(key));
    return;
  }
  for (const film of told) {
    films.delete(film.key);
    films.set(film.key, film);
  }
  for (const old of [...films.keys()].slice(0, -KEPT)) films.delete(old);
  root.classList.add('on');
  say('failed', '');
  await receiveFilm(films.get(key)).catch(error => { films.delete(key); throw error; });
  open(films.get(key));
  root.dataset.film = key;  // for whoever waits for it
  for (const film of told) {
    if (film.key !== key) receiveFilm(film).catch(() => films.delete(film.key)).then(drawStrip);
  }
}

/** Fetch a film's values; until they are there, it is not in the strip. */
async function receiveFilm(film) {
  const answer = await fetch('film', {method: 'POST', body: film.key});
  if (!answer.ok) throw Error('The film could not be fetched; drop it again.');
  const data = await answer.arrayBuffer();
  const values = film.deep ? new Uint16Array(data) : Uint16Array.from(new Uint8Array(data));
  Object.assign(film, {pyramid: pyramid(values, film.width, film.height), flipped: false, lines: [], layers: null,
    window: [...film.start]});
  let most = 1;
  for (const value of film.pyramid.at(-1).values) most = Math.max(most, value);
  film.span = Math.max(most, film.start[1] - film.start[0]);  // of its levels, about
}

/** A grey PNG's levels, {width, height, values: Uint8Array}, enlarged by a factor. */
async function grey(url, factor = 1) {
  const bitmap = await createImageBitmap(await (await fetch(url)).blob(), {colorSpaceConversion: 'none'});
  const [width, height] = [factor * bitmap.width, factor * bitmap.height];
  const pen = new OffscreenCanvas(width, height).getContext('2d', {willReadFrequently: true});
  pen.drawImage(bitmap, 0, 0, width, height);
  const data = pen.getImageData(0, 0, width, height).data, values = new Uint8Array(width * height);
  for (let at = 0; at < values.length; at++) values[at] = data[4 * at];
  return {width, height, values};
}

async function receiveLayers(text) {
  const layers = JSON.parse(text), waiting = [];
  const load = (holder, name, factor) =>
    waiting.push(grey(holder[name], factor).then(picture => { holder[name] = picture; }));
  load(layers, 'raw');
  load(layers, 'mask');
  for (const network of layers.networks) {
    for (const of of Object.values(network.classes)) {
      load(of, 'heat');
      if (of.mean) for (const name of ['mean', 'difference']) load(of.mean, name, 8);
    }
  }
  await Promise.all(waiting);
  const film = films.get(layers.film);
  if (!film) return;
  const before = film.layers && film.choice;
  film.layers = layers;
  const network = layers.networks.find(n => n.name === before?.network)
    ?? layers.networks.find(n => n.predicted === layers.lead) ?? layers.networks[0];
  film.choice = network && {network: network.name, name: before && network.classes[before.name] ? before.name : null};
  renderer.forget(film);
  if (film === shown || aside.delete(film)) arrange();
  else open(film);  // it is the one whose reading the page tells now
  drawStrip();
  root.dataset.answered = film.key;
}

/** The network that is chosen for a film, the class that is explained, and its heatmap. */
function chosen(film, network = film.layers?.networks.find(n => n.name === film.choice?.network)) {
  if (!network) return null;
  const asked = film.choice.name, name = asked in network.classes ? asked : network.predicted;
  return {network, name, ...network.classes[name]};
}

/** What a heatmap is multiplied with: 1, or its share of the highest peak among the networks of one task. */
function gain(film, of) {
  if (look.scale === 'own') return 1;
  const peaks = film.layers.networks.filter(n => n.task === of.network.task).map(n => chosen(film, n).peak);
  return Math.max(...peaks) > 0 ? Math.max(0, of.peak) / Math.max(...peaks) : 1;
}

// --- what is on the stage --------------------------------------------------------------------------------------------

/** Show a film; a new one is seen whole, and without a measuring tool. */
function open(film) {
  shown = film;
  if (beside === film) beside = null;
  if (!beside) Object.assign(view, {x: 0.5, y: 0.5, zoom: 1});
  look.tool = 'pan';
  arrange();
  drawStrip();
  if (!document.activeElement || document.activeElement === document.body) stage.focus({preventScroll: true});
}

/** Decide which panes there are, and where. */
function arrange() {
  if (!shown) return;
  const film = shown, layers = film.layers, title = of => of && `${of.network.title}: ${of.shown}`;
  const main = of => ({film: of, kind: 'film', label: beside ? of.name : '', note: of.layers?.claim ?? ''});
  if (beside) panes = [main(film), main(beside)];
  else if (look.layout === 'stages' && layers) {
    panes = [
      {film, kind: 'film', label: 'Original', note: `${film.columns}×${film.rows} pixels`},
      {film, kind: 'raw', label: 'Predicted mask', note: 'as the network gives it'},
      {film, kind: 'mask', label: 'Post-processed mask', note: layers.area},
      {film, kind: 'lungs', label: 'Segmented lungs', note: layers.seen},
    ];
  } else if (look.layout === 'networks' && layers?.networks.length) {
    panes = layers.networks.map(network => ({film, kind: 'heat', network}));
  } else if (look.layout === 'mean' && chosen(film)?.mean) {
    const {network, mean} = chosen(film), pane = {film, kind: 'heat', network};
    panes = [
      {...pane, label: 'This film', note: mean.note},
      {...pane, label: `Mean of ${mean.films} X-rays`, note: 'by this network, of this class', heat: mean.mean},
      {...pane, label: 'Difference', note: 'red: more than the mean, blue: less', heat: mean.difference, middle: 0.5},
    ];
  } else panes = [main(film)];
  for (const pane of panes) {
    if (pane.kind !== 'heat' && pane.kind !== 'film') continue;
    pane.of = chosen(pane.film, pane.network);
    if (pane.kind === 'heat' && !pane.label) [pane.label, pane.note] = [title(pane.of), `${pane.of.probability}, ${pane.of.note}`];
  }
  labels.replaceChildren(...panes.map(pane => {
    const label = document.createElement('p'), bold = document.createElement('b');
    bold.textContent = pane.label;
    label.append(bold, ' ' + (pane.kind === 'film' && !beside && look.layout !== 'stages' ? '' : pane.note));
    return label;
  }));
  measure();
}

/** Give every pane its place: as many columns as make the films largest. */
function measure() {
  const width = stage.clientWidth, height = stage.clientHeight;
  if (!shown || !width || !height) return;
  const ratio = shown.width / shown.height, count = panes.length, gap = 2;
  let best = [0, 1];
  for (let columns = 1; columns <= count; columns++) {
    const side = Math.min(width / columns / ratio, height / Math.ceil(count / columns));
    if (side > best[0]) best = [side, columns];
  }
  const columns = best[1], rows = Math.ceil(count / columns);
  const wide = (width - gap * (columns - 1)) / columns, high = (height - gap * (rows - 1)) / rows;
  panes.forEach((pane, number) => {
    pane.left = (number % columns) * (wide + gap);
    pane.top = Math.floor(number / columns) * (high + gap);
    [pane.width, pane.height] = [wide, high];
    const {style} = labels.children[number];
    [style.left, style.top, style.maxWidth] = [`${pane.left}px`, `${pane.top}px`, `${wide}px`];
  });
  const ratioOfScreen = devicePixelRatio * renderer.resolution;
  [canvas.width, canvas.height] = [Math.round(width * ratioOfScreen), Math.round(height * ratioOfScreen)];
  marks.setAttribute('viewBox', `0 0 ${width} ${height}`);
  redraw();
}

const fit = pane => Math.min(pane.width / pane.film.width, pane.height / pane.film.height);
const scaleOf = pane => fit(pane) * view.zoom;  // CSS pixels for a pixel of the film as it was sent
const toFilm = (pane, [x, y]) => [
  view.x * pane.film.width + (x - pane.left - pane.width / 2) / scaleOf(pane),
  view.y * pane.film.height + (y - pane.top - pane.height / 2) / scaleOf(pane),
];
const toScreen = (pane, [x, y]) => [
  pane.left + pane.width / 2 + (x - view.x * pane.film.width) * scaleOf(pane),
  pane.top + pane.height / 2 + (y - view.y * pane.film.height) * scaleOf(pane),
];
const paneAt = ([x, y]) => panes.find(pane =>
  x >= pane.left && x < pane.left + pane.width && y >= pane.top && y < pane.top + pane.height);
const within = (low, value, high) => Math.min(high, Math.max(low, value));

function pan(pane, dx, dy) {
  view.x = within(0, view.x - dx / scaleOf(pane) / pane.film.width, 1);
  view.y = within(0, view.y - dy / scaleOf(pane) / pane.film.height, 1);
  redraw();
}

/** Zoom so that the point of the film at `place` stays there. */
function zoom(pane, factor, place = [pane.left + pane.width / 2, pane.top + pane.height / 2]) {
  const [x, y] = toFilm(pane, place);
  view.zoom = within(0.5, view.zoom * factor, Math.max(1, MOST_ZOOM / fit(pane)));
  view.x = within(0, (x - (place[0] - pane.left - pane.width / 2) / scaleOf(pane)) / pane.film.width, 1);
  view.y = within(0, (y - (place[1] - pane.top - pane.height / 2) / scaleOf(pane)) / pane.film.height, 1);
  redraw();
}

function setWindow(film, level, width) {
  width = within(1, width, 2 * film.span);
  level = within(-film.span, level, 2 * film.span);
  film.window = [level - width / 2, level + width / 2];
  redraw();
}
const levelOf = film => (film.window[0] + film.window[1]) / 2;
const widthOf = film => film.window[1] - film.window[0];

// --- drawing ---------------------------------------------------------------------------------------------------------

const SHADER = `#version 300 es
precision highp float; precision highp int; precision highp usampler2D;
uniform usampler2D film;
uniform sampler2D mask, heat, colours;
uniform int level, kind;           // of the pyramid; 0 film, 1 mask, 2 lungs
uniform vec2 size, corner, origin; // of the film; film at the pane's top left; the pane's top left on the canvas
uniform vec4 box;                  // of the heatmap on the film: left, top, width, height, shares
uniform vec2 window;               // lowest level shown, 1 / width
uniform float step_, inverted, fill, outline, gain, opacity, dimmed, high, middle;
out vec4 colour;
float value(vec2 at) {
  ivec2 sides = textureSize(film, level), most = sides - 1;
  vec2 p = at / size * vec2(sides) - 0.5, part = fract(p);
  ivec2 a = clamp(ivec2(floor(p)), ivec2(0), most), b = min(a + 1, most);
  if (p.x < 0.) part.x = 0.;
  if (p.y < 0.) part.y = 0.;
  vec4 v = vec4(texelFetch(film, a, level).r, texelFetch(film, ivec2(b.x, a.y), level).r,
    texelFetch(film, ivec2(a.x, b.y), level).r, texelFetch(film, b, level).r);
  return mix(mix(v.x, v.y, part.x), mix(v.z, v.w, part.x), part.y);
}
void main() {
  vec2 at = corner + vec2(gl_FragCoord.x - origin.x, origin.y - gl_FragCoord.y) * step_, share = at / size;
  float lung = texture(mask, share).r, edge = abs(lung - 0.5) / max(fwidth(lung), 1e-4);
  colour = vec4(0., 0., 0., 1.);
  if (any(lessThan(at, vec2(0.))) || any(greaterThan(at, size))) return;
  float grey = kind == 1 ? float(lung > 0.5) : clamp((value(at) - window.x) * window.y, 0., 1.);
  if (kind != 1) grey = mix(grey, 1. - grey, inverted);
  if ((kind == 2 || dimmed > 0.) && lung <= 0.5) grey *= kind == 2 ? 0. : 0.12;
  colour.rgb = vec3(grey);
  vec3 accent = vec3(${ACCENT});
  if (fill > 0. && lung > 0.5) colour.rgb = mix(colour.rgb, accent, 0.28);
  vec2 inside = (share - box.xy) / box.zw;
  if (opacity > 0. && all(greaterThanEqual(inside, vec2(0.))) && all(lessThanEqual(inside, vec2(1.)))) {
    float h = texture(heat, inside).r * gain;
    colour.rgb = mix(colour.rgb, texture(colours, vec2((h * 255. + 0.5) / 256., 0.5)).rgb,
      min(1., 2. * abs(h - middle) / (1. - middle)) * opacity);
  }
  if (outline > 0.) colour.rgb = mix(colour.rgb, accent, 1. - smoothstep(0.8, 1.8, edge / high));
}`;

const BLACK = {width: 1, height: 1, values: new Uint8Array(1)};  // one for all frames: `Gpu` keeps a texture of each

/** Everything that a pane needs to be drawn, the same for both renderers. */
function recipe(pane) {
  const film = pane.film, layers = film.layers, over = pane.kind === 'film' || pane.kind === 'heat';
  const of = over && pane.of && (look.heat || pane.kind === 'heat') ? pane.of : null;
  return {
    kind: {raw: 1, mask: 1, lungs: 2}[pane.kind] ?? 0,
    mask: layers ? (pane.kind === 'raw' ? layers.raw : layers.mask) : BLACK,
    heat: of ? pane.heat ?? of.heat : BLACK,
    middle: pane.middle ?? 0,  // of the heatmap's range: where nothing is seen of it
    colours: pane.middle ? DIFFERENCE : look.colours,
    box: of ? of.network.box : [0, 0, 1, 1],
    gain: of ? (pane.heat ? 1 : gain(film, of)) : 0,
    opacity: of ? look.opacity : 0,
    inverted: film.inverted !== film.flipped ? 1 : 0,
    fill: over && layers && look.mask ? 1 : 0,
    outline: over && layers && look.outline ? 1 : 0,
    dimmed: over && layers && look.lungs ? 1 : 0,
  };
}

class Gpu {
  resolution = 1;
  /** None where WebGL2 is missing or is itself drawn by the processor: `Raster` is faster than that. */
  static create() {
    const probe = document.createElement('canvas').getContext('webgl2', {failIfMajorPerformanceCaveat: true});
    const names = probe?.getExtension('WEBGL_debug_renderer_info');
    const drawn = probe ? probe.getParameter(names ? names.UNMASKED_RENDERER_WEBGL : probe.RENDERER) : '';
    probe?.getExtension('WEBGL_lose_context')?.loseContext();
    if (!probe || /swiftshader|llvmpipe|software|basic render/i.test(drawn)) return null;
    const gl = canvas.getContext('webgl2', {antialias: false, alpha: false, powerPreference: 'high-performance'});
    return gl && new Gpu(gl);
  }

  constructor(gl) {
    this.gl = gl;
    canvas.addEventListener('webglcontextlost', event => event.preventDefault());
    canvas.addEventListener('webglcontextrestored', () => { this.start(); redraw(); });
    this.start();
  }

  start() {
    const gl = this.gl, program = gl.createProgram();
    const corners = '#version 300 es\nvoid main() { vec2 p = vec2(gl_VertexID & 1, gl_VertexID >> 1); '
      + 'gl_Position = vec4(4. * p - 1., 0., 1.); }';
    for (const [type, source] of [[gl.VERTEX_SHADER, corners], [gl.FRAGMENT_SHADER, SHADER]]) {
      const shader = gl.createShader(type);
      gl.shaderSource(shader, source);
      gl.compileShader(shader);
      gl.attachShader(program, shader);
    }
    gl.linkProgram(program);
    if (!gl.getProgramParameter(program, gl.LINK_STATUS) && !gl.isContextLost()) {
      throw Error(gl.getProgramInfoLog(program) || gl.getShaderInfoLog(gl.getAttachedShaders(program)[1]));
    }
    gl.useProgram(program);
    this.place = new Proxy({}, {get: (known, name) => known[name] ??= gl.getUniformLocation(program, name)});
    ['film', 'mask', 'heat', 'colours'].forEach((name, unit) => gl.uniform1i(this.place[name], unit));
    gl.enable(gl.SCISSOR_TEST);
    this.textures = new Map();  // of pictures
  }

  /** A texture of the rows of `levels`, made once. */
  texture(key, levels, deep) {
    const gl = this.gl;
    let texture = this.textures.get(key);
    if (texture) return texture;
    texture = gl.createTexture();
    gl.bindTexture(gl.TEXTURE_2D, texture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 1);
    levels.forEach(({width, height, values, rgb}, level) => {
      const [inside, format, type] = deep ? [gl.R16UI, gl.RED_INTEGER, gl.UNSIGNED_SHORT]
        : rgb ? [gl.RGB8, gl.RGB, gl.UNSIGNED_BYTE] : [gl.R8, gl.RED, gl.UNSIGNED_BYTE];
      gl.texImage2D(gl.TEXTURE_2D, level, inside, width, height, 0, format, type, values);
    });
    const filter = deep ? gl.NEAREST : gl.LINEAR;
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MIN_FILTER, deep ? gl.NEAREST_MIPMAP_NEAREST : filter);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAG_FILTER, filter);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_S, gl.CLAMP_TO_EDGE);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_WRAP_T, gl.CLAMP_TO_EDGE);
    gl.texParameteri(gl.TEXTURE_2D, gl.TEXTURE_MAX_LEVEL, levels.length - 1);
    this.textures.set(key, texture);
    return texture;
  }

  /** Free what is no longer on the stage; a film's layers may have changed. */
  forget() {
    for (const texture of this.textures.values()) this.gl.deleteTexture(texture);
    this.textures.clear();
  }

  draw() {
    const gl = this.gl, screen = canvas.width / stage.clientWidth, {place} = this;
    const most = gl.getParameter(gl.MAX_TEXTURE_SIZE);
    gl.scissor(0, 0, canvas.width, canvas.height);
    gl.clearColor(0.055, 0.067, 0.078, 1);
    gl.clear(gl.COLOR_BUFFER_BIT);
    for (const pane of panes) {
      const {film} = pane, r = recipe(pane), [left, top] = [pane.left * screen, pane.top * screen];
      const [width, height] = [pane.width * screen, pane.height * screen];
      const levels = film.pyramid.filter(level => level.width <= most && level.height <= most);
      const colours = {width: 256, height: 1, values: COLOURS[r.colours], rgb: true};
      [[film, levels, true], [r.mask, [r.mask]], [r.heat, [r.heat]], [r.colours, [colours]]].forEach(
        ([key, ...how], unit) => {
          gl.activeTexture(gl.TEXTURE0 + unit);
          gl.bindTexture(gl.TEXTURE_2D, this.texture(key, ...how));
        });
      const perPixel = 1 / scaleOf(pane) / screen, fine = levels[0].width / film.width;
      gl.uniform1i(place.level, within(0, Math.floor(Math.log2(perPixel * fine) + 0.25), levels.length - 1));
      gl.uniform1i(place.kind, r.kind);
      gl.uniform2f(place.size, film.width, film.height);
      gl.uniform2f(place.corner, ...toFilm(pane, [pane.left, pane.top]));
      gl.uniform2f(place.origin, left, canvas.height - top);
      gl.uniform1f(place.step_, perPixel);
      gl.uniform4f(place.box, ...r.box);
      gl.uniform2f(place.window, film.window[0], 1 / widthOf(film));
      gl.uniform1f(place.high, screen);
      for (const name of ['inverted', 'fill', 'outline', 'gain', 'opacity', 'dimmed', 'middle']) {
        gl.uniform1f(place[name], r[name]);
      }
      const box = [Math.round(left), Math.round(canvas.height - top - height), Math.round(width), Math.round(height)];
      gl.viewport(...box);
      gl.scissor(...box);
      gl.drawArrays(gl.TRIANGLES, 0, 3);
    }
  }
}

/** The shader's arithmetic on the processor, each pixel of the screen that of the film which is nearest.

    What depends on a level of the film or of a heatmap alone is in tables, so that a pixel costs a few whole numbers. */
class Raster {
  pen = canvas.getContext('2d', {alpha: false});
  tone = new Uint8ClampedArray(65536);  // of the film's levels
  toned = '';  // for what window
  keep = new Uint16Array(256);  // of a heatmap's levels: how much of the film is left, of 256
  tint = new Uint32Array(3 * 256);  // and 256 times what red, green and blue is added
  pictures = new Map();  // of panes, by their size
  forget() {}

  /** Pixels of the canvas for a CSS pixel: no more than keep a movement smooth. */
  get resolution() { return Math.min(1, Math.sqrt(1.5e6 / (stage.clientWidth * stage.clientHeight)) / devicePixelRatio); }

  draw() {
    const screen = canvas.width / stage.clientWidth;
    this.pen.fillStyle = '#0e1114';
    this.pen.fillRect(0, 0, canvas.width, canvas.height);
    for (const pane of panes) this.drawPane(pane, screen);
  }

  setTone(film, inverted) {
    const low = film.window[0], slope = 255 / widthOf(film), {tone} = this, key = `${low} ${slope} ${inverted}`;
    if (key === this.toned) return;
    this.toned = key;
    const [from, by] = inverted ? [255 + low * slope, -slope] : [-low * slope, slope];
    for (let level = 0; level < 65536; level++) tone[level] = from + level * by;  // which clamps, and rounds
  }

  setTint(r) {
    const colours = COLOURS[r.colours], {keep, tint} = this;
    for (let level = 0; level < 256; level++) {
      const heat = (level * r.gain) | 0;
      const share = Math.min(1, 2 * Math.abs(heat / 255 - r.middle) / (1 - r.middle)) * r.opacity;
      keep[level] = Math.round(256 * (1 - share));
      for (let of = 0; of < 3; of++) tint[3 * level + of] = Math.round(colours[3 * heat + of] * (256 - keep[level]));
    }
  }

  /** A picture to draw a pane into; what of the pane is beside the film stays black. */
  picture(width, height) {
    const key = `${width} ${height}`;
    if (!this.pictures.has(key)) {
      if (this.pictures.size > 8) this.pictures.clear();
      const picture = this.pen.createImageData(width, height);
      this.pictures.set(key, {picture, out: new Uint32Array(picture.data.buffer)});
    }
    return this.pictures.get(key);
  }

  drawPane(pane, screen) {
    const {film} = pane, r = recipe(pane), {tone, keep, tint} = this;
    const width = Math.floor(pane.width * screen), height = Math.floor(pane.height * screen);
    this.setTone(film, r.inverted);
    if (r.opacity) this.setTint(r);
    const {picture, out} = this.picture(width, height);
    const perPixel = 1 / scaleOf(pane) / screen, corner = toFilm(pane, [pane.left, pane.top]);
    const source = film.pyramid[within(0, Math.floor(Math.log2(perPixel) + 0.25), film.pyramid.length - 1)];
    /** Where each row or column of the canvas falls on a picture; -1 beside it. */
    const places = (count, start, side, of, from = 0, share = 1) => {
      const found = new Int32Array(count);
      for (let at = 0; at < count; at++) {
        const place = ((start + (at + 0.5) * perPixel) / side - from) / share;
        found[at] = place < 0 || place >= 1 ? -1 : Math.floor(place * of);
      }
      return found;
    };
    const across = (of, from, share) => places(width, corner[0], film.width, of, from, share);
    const down = (of, from, share) => places(height, corner[1], film.height, of, from, share);
    const columns = across(source.width), rows = down(source.height), {values} = source;
    const first = Math.max(0, columns.findIndex(place => place >= 0));
    const end = columns.findLastIndex(place => place >= 0) + 1;
    const masked = Boolean(r.kind || r.fill || r.outline || r.dimmed);
    const maskColumns = masked ? across(r.mask.width) : null, maskRows = masked ? down(r.mask.height) : null;
    const heatRows = r.opacity ? down(r.heat.height, r.box[1], r.box[3]) : null;
    const heatColumns = r.opacity ? across(r.heat.width, r.box[0], r.box[2]) : null;
    const heat = r.heat.values;
    for (let row = 0; row < height; row++) {
      const start = row * width;
      if (rows[row] < 0) {
        out.fill(0xff000000, start, start + width);
        continue;
      }
      out.fill(0xff000000, start, start + first);
      out.fill(0xff000000, start + end, start + width);
      const line = rows[row] * source.width;
      for (let column = first, at = start + first; column < end; column++, at++) {
        out[at] = 0xff000000 | tone[values[line + columns[column]]] * 0x010101;
      }
      if (masked) this.drawMask(r, out, start, first, end, maskRows, maskColumns, row);
      if (!r.opacity || heatRows[row] < 0) continue;
      const heatLine = heatRows[row] * r.heat.width;
      for (let column = first, at = start + first; column < end; column++, at++) {
        if (heatColumns[column] < 0) continue;
        const level = heat[heatLine + heatColumns[column]], left = keep[level], before = out[at];
        if (left === 256) continue;
        const red = ((before & 255) * left + tint[3 * level]) >> 8;
        const green = ((before >> 8 & 255) * left + tint[3 * level + 1]) >> 8;
        const blue = ((before >> 16 & 255) * left + tint[3 * level + 2]) >> 8;
        out[at] = 0xff000000 | blue << 16 | green << 8 | red;
      }
    }
    if (r.outline) this.drawOutline(r, out, width, height, rows, columns, maskRows, maskColumns);
    this.pen.putImageData(picture, Math.round(pane.left * screen), Math.round(pane.top * screen));
  }

  /** What the mask does to a row of the film: it is shown itself, hides or dims what is outside, or is laid over it. */
  drawMask(r, out, start, first, end, maskRows, maskColumns, row) {
    const line = maskRows[row] * r.mask.width, mask = r.mask.values, accent = ACCENT.map(share => 0.28 * 255 * share);
    const outside = r.kind === 2 ? 0 : r.dimmed ? 0.12 : 1;
    for (let column = first, at = start + first; column < end; column++, at++) {
      const lung = mask[line + maskColumns[column]] > 127;
      let grey = out[at] & 255;
      if (r.kind === 1) grey = lung ? 255 : 0;
      else if (!lung) grey *= outside;
      if (r.fill && lung) {
        const [red, green, blue] = accent;
        out[at] = 0xff000000 | (0.72 * grey + blue) << 16 | (0.72 * grey + green) << 8 | (0.72 * grey + red);
      } else out[at] = 0xff000000 | grey << 16 | grey << 8 | grey;
    }
  }

  /** The edge of the mask, above all else. */
  drawOutline(r, out, width, height, rows, columns, maskRows, maskColumns) {
    const [red, green, blue] = ACCENT.map(share => 255 * share), colour = 0xff000000 | blue << 16 | green << 8 | red;
    const mask = r.mask.values, last = columns.findLastIndex(place => place >= 0);
    for (let row = 0; row < height; row++) {
      if (rows[row] < 0) continue;
      const line = maskRows[row] * r.mask.width;
      const below = maskRows[row + 1] >= 0 ? maskRows[row + 1] * r.mask.width : line;  // a row of the mask, too
      for (let column = Math.max(0, columns.findIndex(place => place >= 0)); column <= last; column++) {
        const here = mask[line + maskColumns[column]] > 127;
        const beside = mask[line + maskColumns[Math.min(column + 1, last)]] > 127;
        if (here !== beside || here !== mask[below + maskColumns[column]] > 127) out[row * width + column] = colour;
      }
    }
  }
}

const renderer = Gpu.create() ?? new Raster();
root.dataset.renderer = renderer instanceof Gpu ? 'webgl2' : 'processor';

let waiting = false;
function redraw() {
  if (waiting) return;
  waiting = true;
  requestAnimationFrame(() => {
    waiting = false;
    if (!shown || !stage.clientWidth) return;
    renderer.draw();
    drawMarks();
    tell();
    root.drawn = (root.drawn ?? 0) + 1;  // frames, for whoever measures
  });
}

// --- measures --------------------------------------------------------------------------------------------------------

const LINES = {ruler: 'ruler', heart: 'heart', thorax: 'thorax'};

/** The length of a line of two points of the film as it was sent, [number, unit]. */
function lengthOf(film, [[ax, ay], [bx, by]]) {
  const {shrunk, spacing} = film, dx = (bx - ax) * shrunk, dy = (by - ay) * shrunk;
  return spacing ? [Math.hypot(dx * spacing.columns, dy * spacing.rows), 'mm'] : [Math.hypot(dx, dy), 'pixels'];
}

const told = ([length, unit]) => `${length.toFixed(unit === 'mm' ? 1 : 0)} ${unit}`;

/** Heart over thorax, as text; '' until both lines are there. */
function ratioOf(film) {
  const [heart, thorax] = ['heart', 'thorax'].map(kind => film.lines.find(line => line.kind === kind));
  if (!heart || !thorax) return '';
  const [a, b] = [heart, thorax].map(line => lengthOf(film, line.ends));
  return b[0] > 0 ? `Cardiothoracic ratio ${(a[0] / b[0]).toFixed(2)} (${told(a)} of ${told(b)})` : '';
}

function drawMarks() {
  if (!marks.firstChild && panes.every(pane => !pane.film.lines.length)) return;
  const make = (name, attributes, text = '') => {
    const mark = document.createElementNS('http://www.w3.org/2000/svg', name);
    for (const [key, value] of Object.entries(attributes)) mark.setAttribute(key, value);
    mark.textContent = text;
    return mark;
  };
  marks.replaceChildren(...panes.flatMap((pane, number) => {
    if (!pane.film.lines.length) return [];
    const clip = make('clipPath', {id: `pane-${number}`});
    clip.append(make('rect', {x: pane.left, y: pane.top, width: pane.width, height: pane.height}));
    const group = make('g', {'clip-path': `url(#pane-${number})`});
    for (const {kind, ends} of pane.film.lines) {
      const [a, b] = ends.map(end => toScreen(pane, end)), length = told(lengthOf(pane.film, ends));
      group.append(make('line', {x1: a[0], y1: a[1], x2: b[0], y2: b[1]}));
      for (const [x, y] of [a, b]) group.append(make('circle', {cx: x, cy: y, r: 3}));
      group.append(make('text', {x: Math.max(a[0], b[0]) + 7, y: (a[0] > b[0] ? a : b)[1] + 4},
        kind === 'ruler' ? length : `${kind} ${length}`));
    }
    return [clip, group];
  }));
}

// --- telling ---------------------------------------------------------------------------------------------------------

let pointer = null;  // place of the mouse on the stage

/** A number with as many digits as a step of the film's values needs. */
const rounded = (value, step) => value.toFixed(within(0, Math.ceil(-Math.log10(step)), 4));

/** Another text in a place; in the text node that is there, as a new one costs a frame a new style. */
function say(name, text) {
  const place = find(`.${name}`);
  if (place.textContent === text) return;
  if (place.firstChild) place.firstChild.data = text;
  else place.textContent = text;
}

/** Set an attribute if it is another: what is the same costs a frame all the same. */
function put(part, name, value) {
  if (part.getAttribute(name) !== String(value)) part.setAttribute(name, value);
}

/** Everything in words: where the pointer is, the window, what was changed, the measures, what is chosen. */
function tell() {
  const film = shown, pane = pointer && paneAt(pointer), [low, high] = film.window;
  let place = '';
  if (pane) {
    const [x, y] = toFilm(pane, pointer).map(Math.floor), of = pane.film;
    if (x >= 0 && y >= 0 && x < of.width && y < of.height) {
      const value = of.first + of.step * of.pyramid[0].values[y * of.width + x];
      place = `row ${y * of.shrunk}, column ${x * of.shrunk}: ${rounded(value, of.step)}`;
    }
  }
  say('place', place);
  const shownAs = value => rounded(film.first + film.step * value, film.step);
  say('window-text', `centre ${shownAs((low + high) / 2)}, width ${rounded((high - low) * film.step, film.step)}`);
  const percent = Math.round(100 * scaleOf(panes[0]) * devicePixelRatio / film.shrunk);  // of a pixel of the screen
  say('zoom-text', `${percent}% of ${film.columns}×${film.rows} pixels`
    + (film.shrunk > 1 ? `, shown at 1/${film.shrunk} of its resolution` : ''));
  const windowed = film.start.some((edge, at) => Math.abs(edge - film.window[at]) > 1e-6);
  say('badge', [film.flipped && 'inverted', windowed && 'windowed'].filter(Boolean).join(', '));
  const unit = film.spacing?.at_detector ? ' Lengths are those at the detector; in the body they are smaller.' : '';
  const next = {ruler: 'Draw a line.', ratio: film.lines.some(line => line.kind === 'heart') ?
    'Draw the greatest width of the thorax.' : 'Draw the greatest width of the heart.'}[look.tool] ?? '';
  const ratio = ratioOf(film);
  say('measured', ((ratio || next) + (film.lines.length || next ? unit : '')).trim());
  const level = find('[name=level]'), width = find('[name=width]');
  for (const [slider, low, value, text] of [
    [level, 0, levelOf(film), shownAs(levelOf(film))],
    [width, 1, widthOf(film), rounded(widthOf(film) * film.step, film.step)],
  ]) {
    put(slider, 'min', low);
    put(slider, 'max', film.span);
    put(slider, 'aria-valuetext', text);
    if (document.activeElement !== slider && Number(slider.value) !== value) slider.value = value;
  }
  for (const button of root.querySelectorAll('[data-do]')) {
    const name = button.dataset.do, [group, value] = name.split(':');
    const on = group === 'layout' ? !beside && look.layout === value : group === 'tool' ? look.tool === value
      : group === 'invert' ? film.flipped : look[group];
    if (group === 'reset') button.disabled = !windowed && !film.flipped;
    if (button.hasAttribute('aria-pressed')) put(button, 'aria-pressed', Boolean(on));
    if ('needs' in button.dataset) button.disabled = !film.layers;
    if (value === 'mean') button.hidden = !chosen(film)?.mean;
  }
  const of = panes.length === 1 && chosen(film), legend = find('.legend-bar');
  const explained = chosen(film);
  say('explained', !explained || (!look.heat && panes[0].kind !== 'heat') ? '' : `Heatmap of ${explained.shown}`
    + (of ? ` by ${of.network.title}: ${of.note}` : ''));
  const stops = [0, 64, 128, 192, 255].map(at => `rgb(${COLOURS[look.colours].slice(3 * at, 3 * at + 3)})`);
  put(legend, 'style', `background:linear-gradient(90deg,${stops})`);
  for (const button of desk.querySelectorAll('[data-network]')) {
    const mine = film.choice?.network === button.dataset.network;
    const on = mine && (film.choice.name ?? '') === (button.dataset.name ?? '');
    put(button, 'aria-pressed', Boolean(on));
    put(button, 'tabindex', on ? 0 : -1);
    button.classList.toggle('lit', Boolean(mine && explained?.name === button.dataset.name));
  }
}

// --- choosing --------------------------------------------------------------------------------------------------------

function choose(network, name) {
  if (!shown?.layers) return;
  const inside = document.activeElement?.closest('[data-network]');
  shown.choice = {network, name: name || null};
  if (beside?.layers) {
    const same = beside.layers.networks.find(n => n.name === network);
    if (same) beside.choice = {...shown.choice};
  }
  arrange();
  if (inside) {
    tell();
    desk.querySelector('[data-network][aria-pressed=true]')?.focus();
  }
}

/** The next network, or class of the same network; its own prediction comes before the first class. */
function turn(networks, classes) {
  const layers = shown?.layers, {length} = layers?.networks ?? [];
  if (!length) return;
  const at = layers.networks.findIndex(n => n.name === shown.choice.network);
  const network = layers.networks[(at + networks + length) % length];
  const names = [null, ...Object.keys(network.classes)];
  const now = Math.max(0, names.indexOf(shown.choice.name));
  choose(network.name, names[(now + classes + names.length) % names.length]);
}

desk.addEventListener('click', event => {
  const button = event.target.closest('[data-network]');
  if (button) choose(button.dataset.network, button.dataset.name);
});
// The table of readings comes after its film's layers, or is drawn anew: mark in it what is chosen.
const reading = document.querySelector('#reading-side');
if (reading) new MutationObserver(() => redraw()).observe(reading, {childList: true, subtree: true});

function drawStrip() {
  const strip = find('.strip'), list = [...films.values()].filter(film => film.pyramid);
  strip.hidden = list.length < 2;
  if (strip.hidden) return strip.replaceChildren();
  strip.replaceChildren(...list.map(film => {
    const item = document.createElement('li'), main = document.createElement('button');
    if (!film.thumbnail) film.thumbnail = thumbnail(film);
    const name = document.createElement('span');
    name.textContent = film.name || 'no name';
    main.append(film.thumbnail, name);
    main.setAttribute('aria-current', film === shown);
    main.title = `Show ${film.name}`;
    main.onclick = () => { open(film); trigger('submit', {film: film.key, beside: false}); };
    item.append(main);
    if (film !== shown) {
      const side = document.createElement('button');
      side.className = 'side';
      side.textContent = film === beside ? 'close' : 'beside';
      side.setAttribute('aria-pressed', film === beside);
      side.ariaLabel = film === beside ? `Close ${film.name}` : `Show ${film.name} beside the film`;
      side.onclick = () => {
        beside = film === beside ? null : film;
        if (beside && !film.layers) {
          aside.add(film);
          trigger('submit', {film: film.key, beside: true});
        }
        arrange();
        drawStrip();
      };
      item.append(side);
    }
    return item;
  }));
}

function thumbnail(film) {
  const {values, width, height} = film.pyramid.at(-1), picture = document.createElement('canvas');
  [picture.width, picture.height] = [width, height];
  const pen = picture.getContext('2d'), data = pen.createImageData(width, height), [low, high] = film.start;
  values.forEach((value, at) => {
    const grey = within(0, 255 * (value - low) / (high - low), 255);
    data.data.fill(film.inverted ? 255 - grey : grey, 4 * at, 4 * at + 3);
    data.data[4 * at + 3] = 255;
  });
  pen.putImageData(data, 0, 0);
  picture.ariaHidden = 'true';
  return picture;
}

// --- acting ----------------------------------------------------------------------------------------------------------

const flip = name => () => { look[name] = !look[name]; };
const layout = name => () => { look.layout = name; beside = null; drawStrip(); };
const tool = name => () => {
  look.tool = look.tool === name ? 'pan' : name;
  if (look.tool === 'ratio') shown.lines = shown.lines.filter(line => line.kind === 'ruler');
};
const ACTIONS = {
  'layout:film': layout('film'), 'layout:stages': layout('stages'), 'layout:networks': layout('networks'),
  'layout:mean': layout('mean'),
  heat: flip('heat'), mask: flip('mask'), outline: flip('outline'), lungs: flip('lungs'),
  invert: () => { shown.flipped = !shown.flipped; },
  reset: () => { shown.window = [...shown.start]; shown.flipped = false; },
  fit: () => Object.assign(view, {x: 0.5, y: 0.5, zoom: 1}),
  one: () => { view.zoom = 1 / fit(panes[0]) / devicePixelRatio; },
  closer: () => zoom(panes[0], 1.25), farther: () => zoom(panes[0], 0.8),
  'tool:ruler': tool('ruler'), 'tool:ratio': tool('ratio'),
  undo: () => { shown.lines.pop(); },
  narrower: () => setWindow(shown, levelOf(shown), widthOf(shown) / 1.1),
  wider: () => setWindow(shown, levelOf(shown), widthOf(shown) * 1.1),
  lower: () => setWindow(shown, levelOf(shown) - 0.05 * widthOf(shown), widthOf(shown)),
  higher: () => setWindow(shown, levelOf(shown) + 0.05 * widthOf(shown), widthOf(shown)),
  before: () => turn(-1, 0), next: () => turn(1, 0), up: () => turn(0, -1), down: () => turn(0, 1),
  left: () => pan(panes[0], 60, 0), right: () => pan(panes[0], -60, 0),
  above: () => pan(panes[0], 0, 60), below: () => pan(panes[0], 0, -60),
  screen: () => document.fullscreenElement ? document.exitFullscreen() : desk.requestFullscreen(),
  help: () => { const help = find('.help-keys'); help.open ? help.close() : help.show(); },
  nothing: () => { look.tool = 'pan'; find('.help-keys').close(); },
};
const KEYS = {
  0: 'fit', 1: 'one', '+': 'closer', '=': 'closer', '-': 'farther', i: 'invert', r: 'reset', '[': 'narrower',
  ']': 'wider', ',': 'lower', '.': 'higher', h: 'heat', m: 'mask', o: 'outline', l: 'lungs', a: 'layout:film',
  s: 'layout:stages', n: 'layout:networks', e: 'layout:mean', d: 'tool:ruler', c: 'tool:ratio', Backspace: 'undo', f: 'screen',
  '?': 'help', Escape: 'nothing', ArrowLeft: 'before', ArrowRight: 'next', ArrowUp: 'up', ArrowDown: 'down',
  'Shift+ArrowLeft': 'left', 'Shift+ArrowRight': 'right', 'Shift+ArrowUp': 'above', 'Shift+ArrowDown': 'below',
};
const NEED = new Set(['heat', 'mask', 'outline', 'lungs', 'layout:stages', 'layout:networks', 'layout:mean']);  // layers

function act(name) {
  if (!shown || (NEED.has(name) && !shown.layers)) return;
  if (name === 'layout:mean' && !chosen(shown)?.mean) return;
  ACTIONS[name]();
  arrange();
}

// Keys count where the viewer or the readings have the focus: elsewhere they belong to the page and to screen readers.
desk.addEventListener('keydown', event => {
  if (event.ctrlKey || event.altKey || event.metaKey || !shown) return;
  const {target} = event, arrow = event.key.startsWith('Arrow');
  if (target.matches('textarea, select, [role=listbox], input:not([type=range]):not([type=checkbox])')) return;
  if (arrow && target.matches('input')) return;
  if (arrow && target.closest('.toolbar') && !event.shiftKey) return moveInToolbar(event);
  const key = event.key.length === 1 ? event.key.toLowerCase() : event.key;
  const name = KEYS[arrow && event.shiftKey ? `Shift+${key}` : key];
  if (!name || (name === 'undo' && !shown.lines.length)) return;
  event.preventDefault();
  act(name);
});

/** One stop of the tab key for all buttons; arrows go from one to the next. */
find('.toolbar').querySelectorAll('button').forEach((button, at) => { button.tabIndex = at ? -1 : 0; });
function moveInToolbar(event) {
  const buttons = [...find('.toolbar').querySelectorAll('button:not(:disabled, [hidden])')];
  const by = {ArrowLeft: -1, ArrowUp: -1, ArrowRight: 1, ArrowDown: 1}[event.key];
  const next = buttons[(buttons.indexOf(event.target) + by + buttons.length) % buttons.length];
  for (const button of find('.toolbar').querySelectorAll('button')) button.tabIndex = button === next ? 0 : -1;
  next.focus();
  event.preventDefault();
}

root.addEventListener('click', event => {
  const button = event.target.closest('[data-do]');
  if (button) act(button.dataset.do);
});
root.addEventListener('input', event => {
  const {name, value} = event.target, number = Number(value);
  if (name === 'opacity') look.opacity = number;
  if (name === 'colours' || name === 'scale') look[name] = value;
  if (name === 'level') setWindow(shown, number, widthOf(shown));
  if (name === 'width') setWindow(shown, levelOf(shown), number);
  redraw();
});

// Mouse, pen and fingers: one pans, or draws a line; the right button sets the window; two zoom and pan.
const held = new Map();  // pointers on the stage: where each is
let dragged = null;  // {pane, what, line}

const placeOf = event => {
  const box = stage.getBoundingClientRect();
  return [event.clientX - box.left, event.clientY - box.top];
};

stage.addEventListener('contextmenu', event => event.preventDefault());
stage.addEventListener('pointerdown', event => {
  const place = placeOf(event), pane = paneAt(place);
  if (!pane || event.target.closest('dialog')) return;
  stage.focus({preventScroll: true});
  stage.setPointerCapture(event.pointerId);
  held.set(event.pointerId, place);
  if (held.size > 1 && dragged?.line) pane.film.lines.pop();
  dragged = {pane, what: held.size > 1 ? 'pinch' : event.button === 2 ? 'window' : event.button ? 'pan' : look.tool};
  if (dragged.what === 'ruler' || dragged.what === 'ratio') {
    const end = toFilm(pane, place), {lines} = pane.film;
    const kind = dragged.what === 'ruler' ? LINES.ruler : lines.some(l => l.kind === 'heart') ? LINES.thorax : LINES.heart;
    dragged.line = {kind, ends: [end, [...end]]};
    lines.push(dragged.line);
  }
});
stage.addEventListener('pointermove', event => {
  const place = placeOf(event), before = held.get(event.pointerId);
  pointer = place;
  if (!before || !dragged) return redraw();
  const others = [...held].filter(([id]) => id !== event.pointerId).map(([, at]) => at);
  held.set(event.pointerId, place);
  const {pane, what, line} = dragged, [dx, dy] = [place[0] - before[0], place[1] - before[1]];
  if (what === 'pinch' && others.length) {
    const [other] = others, apart = at => Math.hypot(at[0] - other[0], at[1] - other[1]);
    const middle = at => [(at[0] + other[0]) / 2, (at[1] + other[1]) / 2];
    pan(pane, dx / 2, dy / 2);
    zoom(pane, apart(place) / Math.max(1, apart(before)), middle(place));
  } else if (what === 'window') {
    const {film} = pane, speed = film.span / 600, sign = film.inverted !== film.flipped ? -1 : 1;
    setWindow(film, levelOf(film) + sign * dy * speed, widthOf(film) + dx * speed);
  } else if (line) {
    const [x, y] = toFilm(pane, place);
    line.ends[1] = [x, line.kind === 'ruler' ? y : line.ends[0][1]];  // the two widths are measured across
    redraw();
  } else pan(pane, dx, dy);
});
for (const end of ['pointerup', 'pointercancel']) {
  stage.addEventListener(end, event => {
    held.delete(event.pointerId);
    if (dragged?.line) {
      const {lines} = dragged.pane.film, [a, b] = dragged.line.ends.map(point => toScreen(dragged.pane, point));
      if (Math.hypot(a[0] - b[0], a[1] - b[1]) < 4) lines.pop();  // a click
      else if (look.tool === 'ruler' || dragged.line.kind === 'thorax') look.tool = 'pan';
    }
    dragged = held.size ? {...dragged, what: 'pan', line: null} : null;
    redraw();
  });
}
stage.addEventListener('pointerleave', () => { pointer = null; redraw(); });
stage.addEventListener('wheel', event => {
  const place = placeOf(event), pane = paneAt(place);
  if (!pane) return;
  event.preventDefault();
  const lines = event.deltaMode === WheelEvent.DOM_DELTA_PIXEL ? 1 : 30;
  zoom(pane, Math.exp(-0.0015 * within(-400, event.deltaY * lines, 400)), place);
}, {passive: false});
stage.addEventListener('dblclick', () => act('fit'));

// A file that is dropped on the film is the next film.
for (const name of ['dragover', 'drop']) {
  root.addEventListener(name, event => {
    event.preventDefault();
    const input = document.querySelector('#drop input[type=file]');
    if (name === 'dragover' || !input || !event.dataTransfer.files.length) return;
    input.files = event.dataTransfer.files;
    input.dispatchEvent(new Event('change', {bubbles: true}));
  });
}

// By it a page that is reloaded gets its films back. It is not asked first: Gradio ends its connection before the answer.
addEventListener('manet-token', event => { try { sessionStorage.setItem('manet', event.detail); } catch { /* as without */ } });

new ResizeObserver(measure).observe(stage);
let arrived = Promise.resolve();  // one after another: layers need their film
for (const [name, receive] of [['manet-films', receiveFilms], ['manet-layers', receiveLayers]]) {
  addEventListener(name, event => { arrived = arrived.then(() => receive(event.detail)).catch(error => say('failed', error.message)); });
}
