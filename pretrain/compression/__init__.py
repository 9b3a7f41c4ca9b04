"""Smaller models of trained ones: cut, quantised, measured."""
