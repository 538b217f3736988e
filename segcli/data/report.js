"use strict";
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  const root = document.getElementById("entries");
  const field = (id) => document.getElementById(id);
  const toggles = [...document.querySelectorAll(".toggle")];
  const colors = new Map(data.colors.map(([id, r, g, b]) => [id, [r, g, b]]));
  const shown = new Set(colors.keys());

  const entries = [...root.children].map((element, order) => {
    const { shares, ...keys } = JSON.parse(element.dataset.entry);
    const path = element.querySelector(".path").textContent;
    const canvases = [...element.querySelectorAll("canvas")];
    return { ...keys, element, order, path, canvases, shares: new Map(shares), near: false, ids: null };
  });
  const entryOf = new Map(entries.map((entry) => [entry.element, entry]));

  // A pixel's grey value is its class id; above 255 classes red is the low byte, green the high one.
  async function readIds(canvas) {
    const picture = new Image();
    picture.src = canvas.dataset.ids;
    await picture.decode();
    const { naturalWidth: width, naturalHeight: height } = picture;
    const scratch = Object.assign(document.createElement("canvas"), { width, height });
    const context = scratch.getContext("2d", { willReadFrequently: true });
    context.drawImage(picture, 0, 0);
    const rgba = context.getImageData(0, 0, width, height).data;
    const values = new Uint16Array(width * height);
    for (let i = 0; i < values.length; i++) {
      values[i] = rgba[4 * i] + (data.wide ? 256 * rgba[4 * i + 1] : 0);
    }
    return { width, height, values };
  }

  function paint(entry) {
    if (!entry.ids) return;
    const [predicted, truth] = entry.ids;
    const onlyWrong = truth && field("wrong")?.checked;
    entry.ids.forEach(({ width, height, values }, place) => {
      const canvas = entry.canvases[place];
      const picture = new ImageData(width, height);
      const rgba = picture.data;
      for (let i = 0; i < values.length; i++) {
        const id = values[i];
        if (!shown.has(id)) continue;
        if (onlyWrong && (predicted.values[i] === truth.values[i] || !colors.has(truth.values[i]))) continue;
        rgba.set(colors.get(id), 4 * i);
        rgba[4 * i + 3] = 255;
      }
      Object.assign(canvas, { width, height });
      // In plain memory: it is painted by hand, and a graphics card would hold thousands of them.
      canvas.getContext("2d", { willReadFrequently: true }).putImageData(picture, 0, 0);
    });
  }

  // Only what is in view, or nearly, holds pixels: a page may have thousands of images.
  const observer = new IntersectionObserver((changes) => {
    for (const { target, isIntersecting } of changes) {
      const entry = entryOf.get(target);
      entry.near = isIntersecting;
      if (!isIntersecting) {
        entry.ids = null;
        for (const canvas of entry.canvases) canvas.width = canvas.height = 1;
      } else if (!entry.ids && entry.canvases.length) {
        Promise.all(entry.canvases.map(readIds)).then((ids) => {
          if (!entry.near) return;
          entry.ids = ids;
          paint(entry);
        });
      }
    }
  }, { rootMargin: "400px" });
  for (const entry of entries) observer.observe(entry.element);

  const repaint = () => entries.forEach(paint);

  function chosenClass() {
    const value = field("class")?.value ?? "";
    return value === "" ? null : Number(value);
  }

  function filter() {
    const text = field("text").value.toLowerCase();
    const id = chosenClass();
    const least = Number(field("least")?.value || 0) / 100;
    const surest = Number(field("surest")?.value || 1);
    const error = Number(field("error")?.value || 0) / 100;
    let count = 0;
    for (const entry of entries) {
      const share = id === null ? 1 : entry.shares.get(id) ?? 0;
      // What has no such figure is compared as undefined: it stays.
      const fits = entry.path.toLowerCase().includes(text) && share >= least && (id === null || share > 0)
        && !(entry.confidence > surest) && !(entry.error < error);
      entry.element.hidden = !fits;
      count += fits;
    }
    field("count").textContent = count === entries.length ? `${count} images` : `${count} of ${entries.length} images`;
  }

  function sort() {
    const choice = field("sort").value;
    const sign = choice.startsWith("-") ? -1 : 1;
    const key = choice.replace(/^-/, "");
    const id = chosenClass();
    const value = (entry) => (key === "share" ? entry.shares.get(id) ?? 0 : entry[key]);
    const sorted = [...entries].sort((a, b) => {
      const [x, y] = [value(a), value(b)];
      // What has no such figure comes last either way.
      if (x === undefined || y === undefined) return (x === undefined) - (y === undefined) || a.order - b.order;
      return sign * ((x > y) - (x < y)) || a.order - b.order;
    });
    root.append(...sorted.map((entry) => entry.element));
  }

  field("text").addEventListener("input", filter);
  for (const id of ["least", "surest", "error"]) field(id)?.addEventListener("input", filter);
  field("class")?.addEventListener("change", () => { filter(); sort(); });
  field("sort").addEventListener("change", sort);
  field("wrong")?.addEventListener("change", repaint);
  field("opacity")?.addEventListener("input", (event) => {
    document.documentElement.style.setProperty("--opacity", event.target.value / 100);
  });
  root.addEventListener("input", (event) => {
    if (!event.target.matches(".divider")) return;
    const picture = event.target.closest(".entry").querySelector(".picture");
    picture.style.setProperty("--cut", `${event.target.value}%`);
  });

  function toggled() {
    shown.clear();
    for (const box of toggles) if (box.checked) shown.add(Number(box.value));
    repaint();
  }
  for (const box of toggles) box.addEventListener("change", toggled);
  for (const [id, checked] of [["all", true], ["none", false]]) {
    field(id)?.addEventListener("click", () => {
      for (const box of toggles) box.checked = checked;
      toggled();
    });
  }

  // The list of classes sticks below the tools, which take another line where the window is narrow.
  const tools = document.querySelector(".tools");
  new ResizeObserver(() => {
    document.documentElement.style.setProperty("--tools", `${tools.offsetHeight}px`);
  }).observe(tools);

  // A browser keeps a form's state over a reload.
  filter();
  sort();
  toggled();
})();
