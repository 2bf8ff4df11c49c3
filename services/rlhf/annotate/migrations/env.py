"""Alembic's entry: migrates over the connection that `rlhf.annotate.database` hands over."""

from __future__ import annotations

from alembic import context

from rlhf.annotate.tables import Base

context.configure(
    connection=context.config.attributes["connection"], target_metadata=Base.metadata, transactional_ddl=True
)
with context.begin_transaction():
    context.run_migrations()
