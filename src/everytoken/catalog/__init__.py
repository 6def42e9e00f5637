"""The papers: one card each, search by words and by meaning."""

from .cards import Card, find_card, load_catalog
from .house import CardError, stations
from .search import search

__all__ = ["Card", "CardError", "find_card", "load_catalog", "search", "stations"]
