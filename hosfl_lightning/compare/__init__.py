"""Several methods under one budget: runs at equal conditions, then tables and pictures.

:mod:`.settings` says what a comparison is, :mod:`.runner` runs it in :mod:`.worker` processes, :mod:`.results` reads
the run folders and reckons, :mod:`.table`, :mod:`.pictures` and :mod:`.publish` show it.
"""
