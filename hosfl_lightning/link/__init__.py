"""Who is at the other end: certificates, what a site shows, and which client a name is.

:mod:`.authority` keeps a CA and issues through :mod:`.certificates`; :mod:`.credentials` is what a site loads and what
it learns of its peer; :mod:`.allow_list` and :mod:`.revoked` say who may join. Needs the extra ``remote``.
"""
