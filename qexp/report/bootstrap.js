"use strict";
// The paired bootstrap over windows, as bootstrap.py and compare.py have it, digit for digit.
function pairing(data) {
  function paired(row, base, set) {
    const [a, b] = [losses(row, set), losses(base, set)], [fp, other] = [row.fp[set], base.fp[set]];
    const known = typeof fp === "number" && typeof other === "number";
    const same = !known || Math.abs(fp - other) <= data.same * Math.abs(fp);
    if (!a || a.length !== b?.length || a.length < 2 || !same) return null;
    const n = a.length, delta = Float64Array.from(a, (loss, i) => loss - b[i]), places = draws(n);
    const means = new Float64Array(data.resamples);
    for (let r = 0, at = 0; r < means.length; r++) {
      let sum = 0;
      for (let i = 0; i < n; i++) sum += delta[places[at++]];
      means[r] = sum / n;
    }
    means.sort();
    const [low, high] = data.levels.map((level) => {
      const at = level * (means.length - 1), below = Math.floor(at);
      return means[below] + (at - below) * (means[below + 1] - means[below]);
    });
    return { mean: delta.reduce((sum, d) => sum + d, 0) / n, low, high };
  }

  const losses = (row, set) => {
    if (typeof row.losses[set] === "string")
      row.losses[set] = new Float32Array(Uint8Array.from(atob(row.losses[set]), (c) => c.charCodeAt(0)).buffer);
    return row.losses[set];
  };

  const drawn = new Map();
  function draws(n) {  // mulberry32 with seed 0
    if (drawn.has(n)) return drawn.get(n);
    const places = new Uint32Array(data.resamples * n);
    for (let i = 0, a = 0; i < places.length; i++) {
      a = (a + 0x6D2B79F5) | 0;
      let t = Math.imul(a ^ (a >>> 15), a | 1);
      t ^= t + Math.imul(t ^ (t >>> 7), t | 61);
      places[i] = ((t ^ (t >>> 14)) >>> 0) * n / 4294967296;
    }
    drawn.set(n, places);
    return places;
  }

  return paired;
}
