// The order of what the search finds: first the pages with all words in one title, then those that have them next to
// each other, then those with all in one section. By the score alone a page with one rare word of several comes first.
{
  const RESULT = 3; // the type of the worker's message

  const plain = (html) => (html || "").replace(/<[^>]*>/g, "").toLowerCase();

  const rank = (sections) =>
    Math.max(
      ...sections.map(({ title, text, terms }) => {
        const words = Object.keys(terms).map((term) => term.replace(/\*$/, ""));
        if (!words.length) return 0;
        if (words.every((word) => plain(title).includes(word))) return 3;
        if (!Object.values(terms).every(Boolean)) return 0;
        const escaped = words.map((word) => word.replace(/[^\p{L}\p{N}_]/gu, "\\$&"));
        return new RegExp(escaped.join("[\\s-]+")).test(plain(text)) ? 2 : 1;
      }),
    );

  window.Worker = class extends window.Worker {
    constructor(url) {
      super(url);
      // Before the listener of the theme, which gets the same object.
      this.addEventListener("message", ({ data }) => {
        if (data.type !== RESULT) return;
        const ranks = new Map(data.data.items.map((sections) => [sections, rank(sections)]));
        data.data.items.sort((one, other) => ranks.get(other) - ranks.get(one)); // equal ones stay by their score
      });
    }
  };
}
