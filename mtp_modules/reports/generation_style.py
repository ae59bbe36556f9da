"""Style and script of the page that shows a generation."""

SHADES = 8
"""Number of depths with their own colour; deeper ones share the last."""

_LIGHT = ("eef7b0", "c7e9b4", "8ed8c0", "5cc4cc", "3fa5d2", "225ea8", "253494", "3b0f70")
_DARK = ("4d5a16", "2c6639", "1f7566", "177990", "2a6cb8", "8aa2f2", "b39df5", "dba6f5")
_WHITE_FROM = 6
"""First shade that inverts the text colour: white on dark shades in light mode, black on light ones in dark mode."""


def _shades(colours: tuple[str, ...], near: str, far: str) -> str:
    return " ".join(
        f".d{depth} {{ background: #{colour}; color: {near if depth < _WHITE_FROM else far}; }}"
        for depth, colour in enumerate(colours, start=1)
    )


STYLE = f"""
{_shades(_LIGHT, "#10151b", "#ffffff")}
@media (prefers-color-scheme: dark) {{ {_shades(_DARK, "#ffffff", "#10151b")} }}
.layout {{ display: grid; grid-template-columns: minmax(0, 1fr) 21rem; gap: 2rem; align-items: start; }}
.card {{ margin-bottom: 1rem; }}
.text {{ margin-top: 1rem; font: 15px/1.75 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere; padding: 1rem 1.25rem;
  border: 1px solid var(--line); border-radius: .6rem; }}
.prompt {{ color: var(--soft); }}
.t {{ border-radius: 2px; cursor: default; outline-offset: 1px; }}
.t:hover, .t:focus-visible {{ outline: 2px solid var(--ink); }}
.r {{ display: none; color: var(--second); }}
#rejected:checked ~ .text .r {{ display: inline; }}
#rejected {{ margin: 0 .5rem 0 0; }}
.mark {{ opacity: .45; }}
.byte {{ font-size: .7em; border: 1px solid currentColor; border-radius: 3px; padding: 0 2px; margin: 0 1px; }}
.about {{ display: none; position: fixed; top: 1.5rem; right: max(1.5rem, calc(50vw - 36.5rem)); width: 21rem;
  z-index: 1; padding: .9rem 1.1rem; background: var(--card); color: var(--ink); border: 1px solid var(--line);
  border-radius: .6rem; box-shadow: 0 6px 24px rgb(0 0 0 / .18); font: 14px/1.45 system-ui, sans-serif;
  white-space: normal; }}
.t:hover > .about, .t:focus-visible > .about {{ display: block; }}
.text:has(.t:hover) .t:focus-visible:not(:hover) > .about {{ display: none; }}
.about code {{ font-size: 1.15em; font-weight: 600; padding: 0 .3em; background: var(--paper); border-radius: 3px; }}
.about p {{ margin: .4rem 0; }}
.about table {{ width: 100%; margin-top: .5rem; table-layout: fixed; }}
.about caption {{ text-align: left; color: var(--soft); font-weight: 600; }}
.about td {{ padding: .12rem .4rem; text-align: left; overflow: hidden; text-overflow: ellipsis; }}
.about td:nth-child(2) {{ width: 4.6rem; text-align: right; }}
.about td code {{ font-size: 1em; background: none; }}
.about .chosen {{ font-weight: 700; }}
.about i, .bar i {{ display: block; height: .55rem; background: var(--accent); border-radius: 2px; min-width: 1px; }}
aside {{ position: sticky; top: 1.5rem; border: 1px dashed var(--line); border-radius: .6rem; padding: 1rem 1.1rem; }}
.figures {{ display: flex; flex-wrap: wrap; gap: .25rem 2rem; margin: 0 0 .75rem; }}
.figures b {{ font-size: 1.35rem; }}
.legend {{ display: grid; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); gap: .35rem 1.25rem; margin: 0;
  padding: 0; list-style: none; font-size: .92rem; }}
.swatch {{ display: inline-block; width: 1.1em; height: 1.1em; border-radius: 3px; margin-right: .5em;
  vertical-align: -.2em; }}
.swatch.own {{ border: 1px solid var(--third); }}
.bar:not(td) {{ display: block; background: var(--line); border-radius: 2px; margin-top: .15rem; }}
@media (max-width: 60rem) {{
  .layout {{ display: block; }}
  .text {{ margin-bottom: 24rem; }}
  .distributions {{ display: grid; grid-template-columns: 1fr 1fr; gap: 1.5rem; }}
  aside {{ display: none; }}
  .about {{ top: auto; bottom: 0; left: 0; right: 0; width: auto; border-radius: .6rem .6rem 0 0; }}
}}
@media print {{
  {_shades(_LIGHT, "#10151b", "#ffffff")}
  .layout {{ display: block; }}
  .text {{ margin: 0; border: none; padding: 0; font-size: 10pt; }}
  aside, .about, .t:hover > .about, .t:focus-visible > .about, input, label {{ display: none; }}
}}
"""

SCRIPT = """
(() => {
  const text = document.querySelector(".text");
  const tokens = () => [...text.querySelectorAll(".t")].filter((one) => one.offsetParent !== null);
  const enter = (one) => {
    text.querySelectorAll('.t[tabindex="0"]').forEach((other) => { other.tabIndex = -1; });
    one.tabIndex = 0;
  };
  text.querySelectorAll(".t").forEach((one) => { one.tabIndex = -1; });
  if (tokens().length) enter(tokens()[0]);
  text.addEventListener("focusin", (event) => enter(event.target));
  document.getElementById("rejected").addEventListener("change", () => {
    if (tokens().length) enter(tokens()[0]);
  });
  text.addEventListener("keydown", (event) => {
    const all = tokens(), place = all.indexOf(event.target);
    const next = { ArrowRight: place + 1, ArrowLeft: place - 1, Home: 0, End: all.length - 1 }[event.key];
    if (place < 0 || next === undefined || !all[next]) return;
    event.preventDefault();
    all[next].focus();
  });
  text.addEventListener("keydown", (event) => { if (event.key === "Escape") event.target.blur(); });
})();
"""
