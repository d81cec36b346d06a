"""The contrast of text with what is behind it, as WCAG 2.2 defines it (success criterion 1.4.3)."""

from typing import Any

from headless_browser import HeadlessBrowser

# A canvas turns any notation of a colour into numbers.
_READ = """
const canvas = document.createElement('canvas');
canvas.width = canvas.height = 1;
const context = canvas.getContext('2d', {willReadFrequently: true});
const numbers = new Map();
const rgba = colour => {
    if (!numbers.has(colour)) {
        context.clearRect(0, 0, 1, 1);
        context.fillStyle = colour;
        context.fillRect(0, 0, 1, 1);
        numbers.set(colour, [...context.getImageData(0, 0, 1, 1).data]);
    }
    return numbers.get(colour);
};
const behind = element => {
    for (let e = element; e; e = e.parentElement) {
        const colour = rgba(getComputedStyle(e).backgroundColor);
        if (colour[3] === 255) return colour;
    }
    return [255, 255, 255, 255];
};
const found = new Map();
const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || !element.checkVisibility({opacityProperty: true, visibilityProperty: true}))
        continue;
    if (['SCRIPT', 'STYLE', 'NOSCRIPT'].includes(element.tagName)) continue;
    const colours = [rgba(getComputedStyle(element).color), behind(element)];
    found.set(JSON.stringify(colours), [...colours, walker.currentNode.data.trim().slice(0, 40)]);
}
return [...found.values()];
"""


def luminance(colour: list[int]) -> float:
    """Returns the relative luminance of an sRGB colour, between 0 and 1."""
    linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in colour[:3])]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(a: list[int], b: list[int]) -> float:
    """Returns the contrast of two colours, between 1 and 21."""
    low, high = sorted((luminance(a), luminance(b)))
    return (high + 0.05) / (low + 0.05)


def contrasts_of_text(browser: HeadlessBrowser) -> dict[str, float]:
    """Returns, for each pair of colours of the open page's visible text, a piece of such text and the contrast."""
    found: list[tuple[Any, Any, str]] = browser.run(_READ)
    return {f"{text!r} {colour[:3]} on {behind[:3]}": contrast(colour, behind) for colour, behind, text in found}


def background(browser: HeadlessBrowser) -> list[int]:
    """Returns the colour of the open page's background."""
    numbers = browser.run("return getComputedStyle(document.body).backgroundColor.match(/[0-9.]+/g).map(Number)")
    return [int(number) for number in numbers]
