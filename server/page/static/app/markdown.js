// Markdown to safe HTML. A model's text is hostile: HTML in it is shown as text, images are not loaded, and DOMPurify has
// the last word with a short list of what may stay.
import { Marked } from "../vendor/marked.mjs";
import "../vendor/purify.js";

const purify = globalThis.DOMPurify;
const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre",
  "strong", "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const ATTRIBUTES = ["href", "align", "start"];
const OPTIONS = {
  ALLOWED_TAGS: TAGS, ALLOWED_ATTR: ATTRIBUTES, ALLOW_DATA_ATTR: false, ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i, RETURN_TRUSTED_TYPE: true,
};

const escaped = (text) => text.replace(/[&<>"']/g, (c) => `&#${c.charCodeAt(0)};`);

const marked = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text, block }) => (block ? `<pre><code>${escaped(text)}</code></pre>` : escaped(text)),
    checkbox: ({ checked }) => (checked ? "☑ " : "☐ "),
    image: ({ text, href }) => `${escaped(text || "image")} (${escaped(href)}, not loaded)`,
  },
});

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "A" && node.hasAttribute("href")) {
    node.setAttribute("rel", "noopener noreferrer nofollow");
    node.setAttribute("target", "_blank");
    // Shown in full: the words of a link must not hide where it leads.
    const href = node.getAttribute("href");
    if (!sameAddress(node.textContent, href)) node.append(` (${href})`);
  }
  if (node.nodeName === "PRE") node.setAttribute("tabindex", "0"); // long lines scroll: the keyboard has to get there
});

function sameAddress(text, href) {
  const plain = (address) => address.replace(/^mailto:/i, "").replace(/\/$/, "");
  return plain(text.trim()) === plain(href);
}

export function toHtml(text) {
  return purify.sanitize(marked.parse(text), OPTIONS);
}

// Splits a growing text into blocks, so that only its last block is rendered again when more text comes. The function that
// comes back gives the HTML of each block; earlier blocks are the same objects as before.
export function blockRenderer() {
  let done = []; // HTML of the blocks that can't change any more
  let used = 0; // characters of the text in them
  let seen = "";
  return (given) => {
    const text = given.replace(/\r\n?/g, "\n"); // as the lexer does, so that lengths agree
    if (!text.startsWith(seen)) {
      done = [];
      used = 0;
    }
    seen = text;
    const parts = marked.lexer(text.slice(used));
    // The last two tokens (a block and the space behind it) may still grow: a list goes on after an empty line.
    for (const part of parts.slice(0, -2)) {
      if (part.type !== "space") done = [...done, toHtml(part.raw)];
      used += part.raw.length;
    }
    const tail = text.slice(used);
    return tail.trim() ? [...done, toHtml(tail)] : done;
  };
}
