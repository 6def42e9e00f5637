"""String formats of JSON Schema as regular expressions (whole match)."""

from __future__ import annotations

_OCTET = r"(25[0-5]|2[0-4]\d|1\d\d|[1-9]?\d)"
_IPV4 = rf"{_OCTET}(\.{_OCTET}){{3}}"
_H = r"[0-9a-fA-F]{1,4}"
_IPV6 = "|".join(
    [
        rf"({_H}:){{7}}{_H}",
        rf"({_H}:){{6}}{_IPV4}",
        *(rf"({_H}:){{{n - 1}}}{_H}::(({_H}:){{0,{6 - n}}}{_H})?" for n in range(1, 7)),
        *(rf"({_H}:){{{n - 1}}}{_H}::({_H}:){{0,{5 - n}}}{_IPV4}" for n in range(1, 6)),
        rf"({_H}:){{6}}{_H}::",
        rf"::(({_H}:){{0,6}}{_H})?",
        rf"::({_H}:){{0,5}}{_IPV4}",
    ]
)
_DAY = (
    r"((\d{4})-((0[13578]|1[02])-(0[1-9]|[12]\d|3[01])|(0[469]|11)-(0[1-9]|[12]\d|30)|02-(0[1-9]|1\d|2[0-8]))"
    r"|(\d\d(0[48]|[2468][048]|[13579][26])|([02468][048]|[13579][26])00)-02-29)"
)
_OFFSET = r"([Zz]|[+-]([01]\d|2[0-3]):[0-5]\d)"
_CLOCK = (
    rf"(([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d+)?{_OFFSET}"
    r"|23:59:60(\.\d+)?([Zz]|[+-]00:00))"  # a leap second ends a day of UTC; with other offsets it is not written
)
_LABEL = r"[A-Za-z0-9]([A-Za-z0-9\-]{0,61}[A-Za-z0-9])?"
_HOST = rf"{_LABEL}(\.{_LABEL})*"
_ATOM = r"[A-Za-z0-9!#$%&'*+/=?^_`{|}~\-]+"
_QUOTED = r'"([ !#-\[\]-~]|\\[ -~])*"'
_LITERAL = rf"\[({_IPV4}|IPv6:({_IPV6}))\]"
_HEX = "%[0-9A-Fa-f]{2}"
_UCS = r"\u00a0-\ud7ff\uf900-\ufdcf\ufdf0-\uffef" + "".join(
    rf"\u{{{plane:x}{'1000' if plane == 14 else '0000'}}}-\u{{{plane:x}fffd}}" for plane in range(1, 15)
)
_FUTURE = r"v[0-9A-Fa-f]+\.[A-Za-z0-9\-._~!$&'()*+,;=:]+"
_VARIABLE = r"([A-Za-z0-9_]|%[0-9A-Fa-f]{2})(\.?([A-Za-z0-9_]|%[0-9A-Fa-f]{2}))*(:[1-9]\d{0,3}|\*)?"


def _uris(more: str, private: str = "") -> tuple[str, str]:
    """RFC 3986's absolute URI and URI reference; ``more`` characters are allowed as well (RFC 3987)."""
    pchar = rf"([A-Za-z0-9\-._~!$&'()*+,;=:@{more}]|{_HEX})"
    noscheme = rf"([A-Za-z0-9\-._~!$&'()*+,;=@{more}]|{_HEX})+"
    user = rf"([A-Za-z0-9\-._~!$&'()*+,;=:{more}]|{_HEX})*@"
    name = rf"([A-Za-z0-9\-._~!$&'()*+,;={more}]|{_HEX})*"
    authority = rf"({user})?({name}|\[({_IPV6}|{_FUTURE})\])(:\d*)?"
    rooted = rf"//{authority}(/{pchar}*)*|/({pchar}+(/{pchar}*)*)?"
    tail = rf"(\?({pchar}|[/?{private}])*)?(#({pchar}|[/?])*)?"
    absolute = rf"[A-Za-z][A-Za-z0-9+.\-]*:({rooted}|{pchar}+(/{pchar}*)*)?{tail}"
    relative = rf"({rooted}|{noscheme}(/{pchar}*)*)?{tail}"
    return absolute, f"{absolute}|{relative}"


_URI, _URI_REFERENCE = _uris("")
_IRI, _IRI_REFERENCE = _uris(_UCS, r"\ue000-\uf8ff")

FORMATS: dict[str, str] = {
    "date": _DAY,
    "time": _CLOCK,
    "date-time": rf"{_DAY}[Tt]{_CLOCK}",
    "duration": r"P(\d+W|(\d+Y(\d+M(\d+D)?)?|\d+M(\d+D)?|\d+D)(T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))?"
    r"|T(\d+H(\d+M(\d+S)?)?|\d+M(\d+S)?|\d+S))",
    "email": rf"({_ATOM}(\.{_ATOM})*|{_QUOTED})@({_HOST}|{_LITERAL})",
    "hostname": _HOST,
    "ipv4": _IPV4,
    "ipv6": _IPV6,
    "uuid": r"[0-9a-fA-F]{8}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{4}-[0-9a-fA-F]{12}",
    "uri": _URI,
    "uri-reference": _URI_REFERENCE,
    "iri": _IRI,
    "iri-reference": _IRI_REFERENCE,
    "uri-template": (
        rf"([!#$&(-;=?-\[\]_a-z~{_UCS}\ue000-\uf8ff]|{_HEX}|\{{[+#./;?&=,!@|]?{_VARIABLE}(,{_VARIABLE})*\}})*"
    ),
    "json-pointer": r"(/([^~/]|~[01])*)*",
    "relative-json-pointer": r"(0|[1-9]\d*)(#|(/([^~/]|~[01])*)*)",
}
REFUSED_FORMATS = {
    "regex": "Use a pattern that describes the expressions that you expect.",
    "idn-email": "Use email.",
    "idn-hostname": "Use hostname.",
}
"""Formats of the standard that are not regular, or far too large, and what to use instead."""
SILENT_FORMATS = frozenset(
    {"int32", "int64", "float", "double", "password", "byte", "binary", "uint32", "uint64", "decimal", "textarea"}
)
"""Names that OpenAPI and form generators give to values; they say nothing about a document's text."""
