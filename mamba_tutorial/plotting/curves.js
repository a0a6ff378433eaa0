// Stands in slider.html, which has `data`, `add` and `key` and calls `show`.
const [left, top, bottom] = [42, 8, 214];
const fixed = Object.entries(data.fixed), moving = Object.entries(data.moving);
const all = Object.values(data.fixed).concat(...Object.values(data.moving)).flat()
  .filter((value) => value !== null);
const [low, high] = [Math.min(...all), Math.max(...all)];
const y = (value) => bottom - (bottom - top) * (value - low) / (high - low);
fixed.forEach(([label], k) => key(label, k ? "still dashed" : "still"));
moving.forEach(([label], k) => key(label, k ? "moving second" : "moving"));
const show = (i, wide) => {
  const right = wide - 8, step = (right - left) / data.length, begin = (i) => left + i * step;
  const path = (curve) => curve.map((value, i) => value === null ? "" :
    `${i && curve[i - 1] !== null ? "L" : "M"}${begin(data.smooth ? i + 0.5 : i).toFixed(1)} ` +
    `${y(value).toFixed(1)}${data.smooth ? "" : `h${step.toFixed(2)}`}`).join("");
  for (const [value, label] of data.yticks) {
    add("line", {x1: left, x2: right, y1: y(value), y2: y(value)});
    add("text", {x: left - 8, y: y(value) + 5, "text-anchor": "end"}, label);
  }
  for (const [place, label] of data.xticks) add("text", {x: begin(place + 0.5), y: 235}, label);
  add("text", {x: (left + right) / 2, y: 257}, data.xlabel);
  fixed.forEach(([, curve], k) => add("path", {d: path(curve), "stroke-dasharray": k ? "6 4" : "none"}));
  moving.forEach(([, curves], k) => add("path", {d: path(curves[i]), class: k ? "moving second" : "moving"}));
};
