// Stands in slider.html, which has `data` and `add` and calls `show`.
const places = data.steps[0].intervals.length;
const name = ([first, stop]) =>
  first === stop ? "identity" : stop - first === 1 ? `${first}` : `${first}…${stop - 1}`;
const show = (k, wide) => {
  const pitch = wide / places, cell = Math.min(11, (pitch - 6) / places);
  const x = (place) => (place + 0.5) * pitch;
  const row = (intervals, y, changed) => intervals.forEach(([first, stop], place) => {
    for (let i = 0; i < places; i++) {
      const held = first <= i && i < stop;
      add("rect", {x: x(place) + (i - places / 2) * cell, y: y, width: cell - 1, height: 20,
        class: held ? (changed(place) ? "new" : "held") : ""});
    }
    // the longest name, on a narrow screen, stays inside at both ends
    const middle = first === stop ? Math.min(Math.max(x(place), 28), wide - 28) : x(place);
    add("text", {x: middle, y: y + 37}, name([first, stop]));
  });
  const step = data.steps[k], before = data.steps[Math.max(0, k - 1)];
  const moved = (place) => k && String(step.intervals[place]) !== String(before.intervals[place]);
  if (k) {
    row(before.intervals, 24, () => false);
    for (const [left, right, to] of step.joined) {
      add("line", {x1: x(left), y1: 66, x2: x(to), y2: 170, class: "operand early"});
      add("line", {x1: x(right), y1: 66, x2: x(to), y2: 170, class: "operand"});
    }
  }
  row(step.intervals, 176, moved);
  const short = pitch < 56;  // then there is room for the word once
  for (let place = 0; place < places; place++)
    add("text", {x: short && !place ? 24 : x(place), y: 250, class: "quiet"},
      short && place ? place : `place ${place}`);
};
