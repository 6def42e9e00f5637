"""Tokens across devices: which of a step's tokens compute while others communicate."""
