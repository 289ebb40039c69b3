"""What alembic runs: migrations on the connection that it is given."""

from __future__ import annotations

from alembic import context

from serving.jobs.tables import Base

context.configure(connection=context.config.attributes["connection"], target_metadata=Base.metadata)
with context.begin_transaction():
    context.run_migrations()
