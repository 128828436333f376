// Marks the words of an answer that another one does not have, by the longest common subsequence of words.
const MOST_WORDS = 1500; // beyond it nothing is marked: the table grows with the product

export function wordsOf(text) {
  return text.match(/\s+|[^\s]+/g) ?? [];
}

// The words of `text` as [{ word, isNew }]; isNew: not in the common subsequence with `other`. null if a text is too long.
export function marked(text, other) {
  const mine = wordsOf(text);
  const left = mine.filter((word) => word.trim());
  const right = wordsOf(other).filter((word) => word.trim());
  if (left.length > MOST_WORDS || right.length > MOST_WORDS) return null;
  const common = commonPlaces(left, right);
  let place = -1;
  return mine.map((word) => {
    if (!word.trim()) return { word, isNew: false };
    place += 1;
    return { word, isNew: !common.has(place) };
  });
}

// Places in `left` that belong to a longest common subsequence of both.
function commonPlaces(left, right) {
  const width = right.length + 1;
  const table = new Uint16Array((left.length + 1) * width);
  for (let i = left.length - 1; i >= 0; i -= 1) {
    for (let j = right.length - 1; j >= 0; j -= 1) {
      table[i * width + j] = left[i] === right[j]
        ? table[(i + 1) * width + j + 1] + 1
        : Math.max(table[(i + 1) * width + j], table[i * width + j + 1]);
    }
  }
  const places = new Set();
  for (let i = 0, j = 0; i < left.length && j < right.length;) {
    if (left[i] === right[j]) {
      places.add(i);
      i += 1;
      j += 1;
    } else if (table[(i + 1) * width + j] >= table[i * width + j + 1]) i += 1;
    else j += 1;
  }
  return places;
}
