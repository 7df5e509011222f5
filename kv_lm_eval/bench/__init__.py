"""Measuring speed and memory: model shapes without weights, one timing loop for all, and the card that is printed."""
