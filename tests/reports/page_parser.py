"""The parser of report pages that the tests of both reports extend."""

from __future__ import annotations

from html.parser import HTMLParser

ADDRESSES = {"src", "href", "srcset", "action", "data", "poster", "background", "xlink:href"}
"""Attributes that name a resource."""


class PageParser(HTMLParser):
    """The visible text of a page. Parsing asserts that tags are closed in the order in which they are opened.

    Subclasses append each opened tag that needs an end tag to `open`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.open: list[str] = []

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += "" if "style" in self.open else f"{data} "

    @property
    def words(self) -> str:
        """The text with single spaces."""
        return " ".join(self.text.split())
