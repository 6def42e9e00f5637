"""The trials of the station's contracts, one module each."""
