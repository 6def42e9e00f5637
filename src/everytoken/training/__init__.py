"""The floor of everything that learns: configurations, sessions, reports, what trainers share, data sets."""
