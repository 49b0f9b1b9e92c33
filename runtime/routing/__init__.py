"""Routing: hidden states -> expert ids and weights -> dispatch plan -> combine."""
