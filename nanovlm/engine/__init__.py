"""Answers fast: few bits a weight, conversations that keep their cache, many answers at once."""
