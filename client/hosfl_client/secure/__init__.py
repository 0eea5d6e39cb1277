"""Sums of which the server learns nothing but the sum: what a client does, and what the server does with it.

Needs the extra ``secure``; `hosfl_client.secure.extra` says whether it is there.
"""
