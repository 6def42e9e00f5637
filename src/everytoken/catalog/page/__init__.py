"""The catalogue as web pages: entries, the search index that the browser reads, the feed, and how a site is written."""
