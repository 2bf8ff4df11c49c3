"""The annotation page: people rank completions in a browser, and every judgment is kept, raw and with its provenance.

    server ── app ── pages (login, ranking, lead's) ── store, accounts, quality ── tables ── SQLite or PostgreSQL

`store.Store` is what other parts use: it takes tasks and gives judgments.
"""
