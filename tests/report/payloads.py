"""A hundred answers that a hostile model might give: scripts, markup, template code, escapes, turned-around text."""

from __future__ import annotations

_MARKUP = [
    "<script>window.hit=1</script>", "</script><script>window.hit=1</script>", "<img src=x onerror=window.hit=1>",
    "<svg onload=window.hit=1>", "\"><script>window.hit=1</script>", "'><img src=x onerror=window.hit=1>",
    "<iframe srcdoc='<script>parent.hit=1</script>'></iframe>", "<details open ontoggle=window.hit=1>",
    "<body onload=window.hit=1>", "<a href=javascript:window.hit=1>x</a>", "<style>*{display:none}</style>",
    "</style><script>window.hit=1</script>", "</pre></details></div><script>window.hit=1</script>",
    "<!--", "-->", "<![CDATA[<script>window.hit=1</script>]]>", "<math><mtext><script>window.hit=1</script>",
    "<base href=https://example.invalid/>", "<meta http-equiv=refresh content=0;url=https://example.invalid/>",
    "<link rel=stylesheet href=https://example.invalid/x.css>", "<object data=https://example.invalid/>",
    "<embed src=https://example.invalid/>", "<form action=https://example.invalid/><button>x</button></form>",
    "<input autofocus onfocus=window.hit=1>", "<video><source onerror=window.hit=1></video>",
    "<marquee onstart=window.hit=1>", "<template><script>window.hit=1</script></template>", "<plaintext>", "<noscript>",
    "<textarea>", "<title>x</title>", "</title><script>window.hit=1</script>", "<select><option>x", "<table><tr><td>",
    "{{ 7 * 7 }}", "{% raw %}", "{{ self.__init__.__globals__ }}", "{# hidden #}", "${7*7}", "`${window.hit=1}`",
    "\\u003cscript\\u003ewindow.hit=1\\u003c/script\\u003e", "&lt;script&gt;window.hit=1&lt;/script&gt;",
    "&#60;script&#62;", "%3Cscript%3E", "javascript:window.hit=1", "data:text/html,<script>window.hit=1</script>",
    "\" onmouseover=window.hit=1 x=\"", "' onmouseover=window.hit=1 x='", "` onmouseover=window.hit=1 x=`",
    "x\" data-s=\"9,9\" y=\"", "]]>", "<?xml version='1.0'?>", "<a id=controls>", "<div id=show>",
    "<p style=position:fixed>",
    "</body></html><script>window.hit=1</script>", "<ScRiPt>window.hit=1</sCrIpT>", "<script/x>window.hit=1</script>",
    "<<script>window.hit=1//<</script>", "<img src='x' onerror='window.hit=1'", "<script\x00>window.hit=1</script>",
    "<scr\x00ipt>window.hit=1</scr\x00ipt>", "<svg><animate onbegin=window.hit=1 attributeName=x>",
    "<svg><use href='data:image/svg+xml,<svg id=x onload=window.hit=1>#x'/>",
]  # fmt: skip
_TERMINAL = [
    "\x1b[2J\x1b[H", "\x1b]0;owned\x07", "\x1b]8;;https://example.invalid\x1b\\link\x1b]8;;\x1b\\", "\x1b[31mred",
    "\x9b31m",
    "\x07", "\x08\x08\x08", "a\rb", "\x7f", "\x00", "\x0c", "\x0b", "\x85", "\x90q", "\x1bc", "\x1bP+q\x1b\\",
]  # fmt: skip
_TURNED = [
    "\u202egnp.exe", "\u202dabc", "\u2066x\u2069", "\u2067x\u2069", "\u2068x\u2069", "\u200f\u200e", "\u061c",
    "a\u200bb",
    "\ufeffx", "\u2028x", "\u2029x", "\u2060", "\u00adsoft", "\U000e0041\U000e007f", "\ufff9a\ufffab\ufffb",
    "\u3164", "\u180e",
    "\uffff", "\u034f", "e" + "\u0301" * 60,
]  # fmt: skip
PAYLOADS = [*_MARKUP, *_TERMINAL, *_TURNED]
assert len(PAYLOADS) == 100
