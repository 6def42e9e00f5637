"""The papers: one card each, search by words and by meaning."""

from .cards import STATIONS, Card, CardError, find_card, load_catalog
from .search import search

__all__ = ["STATIONS", "Card", "CardError", "find_card", "load_catalog", "search"]
