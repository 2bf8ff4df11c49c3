"""The first schema: accounts, tasks, assignments, judgments."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None


def upgrade() -> None:
    _people()
    _tasks()
    _answers()


def _people() -> None:
    op.create_table(
        "account",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("pseudonym", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("password_hash", sa.String(), nullable=False),
        sa.Column("guideline_version", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_account"),
        sa.UniqueConstraint("name", name="uq_account_name"),
        sa.UniqueConstraint("pseudonym", name="uq_account_pseudonym"),
    )
    op.create_table(
        "guideline",
        sa.Column("version", sa.String(), nullable=False),
        sa.Column("text", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("version", name="pk_guideline"),
    )
    op.create_table(
        "login_failure",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("name", sa.String(), nullable=False),
        sa.Column("host", sa.String(), nullable=False),
        sa.Column("at", sa.Double(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_login_failure"),
    )
    op.create_index("ix_login_failure_at", "login_failure", ["at"], unique=False)
    op.create_table(
        "invite",
        sa.Column("token_hash", sa.String(), nullable=False),
        sa.Column("role", sa.String(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=True),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.Column("used_at", sa.Double(), nullable=True),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_invite_account_id"),
        sa.PrimaryKeyConstraint("token_hash", name="pk_invite"),
    )
    op.create_table(
        "login",
        sa.Column("token_hash", sa.String(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("csrf", sa.String(), nullable=False),
        sa.Column("expires_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_login_account_id"),
        sa.PrimaryKeyConstraint("token_hash", name="pk_login"),
    )
    op.create_index("ix_login_account_id", "login", ["account_id"], unique=False)


def _tasks() -> None:
    op.create_table(
        "task",
        sa.Column("seq", sa.Integer(), nullable=False),
        sa.Column("id", sa.String(), nullable=False),
        sa.Column("kind", sa.String(), nullable=False),
        sa.Column("prompt_id", sa.String(), nullable=False),
        sa.Column("prompt", sa.String(), nullable=False),
        sa.Column("details", sa.JSON(), nullable=False),
        sa.Column("completions", sa.JSON(), nullable=False),
        sa.Column("need", sa.Integer(), nullable=False),
        sa.Column("free", sa.Integer(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("priority", sa.Double(), nullable=False),
        sa.Column("source", sa.String(), nullable=False),
        sa.Column("p_select", sa.Double(), nullable=True),
        sa.Column("reward_model", sa.String(), nullable=False),
        sa.Column("gold_ranks", sa.JSON(), nullable=True),
        sa.Column("repeats", sa.String(), nullable=True),
        sa.Column("only_for", sa.Integer(), nullable=True),
        sa.Column("closed", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["only_for"], ["account.id"], name="fk_task_only_for"),
        sa.PrimaryKeyConstraint("seq", name="pk_task"),
        sa.UniqueConstraint("id", name="uq_task_id"),
    )
    op.create_table(
        "assignment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("task_seq", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("slot", sa.Integer(), nullable=True),
        sa.Column("order_shown", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("lease_until", sa.Double(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_assignment_account_id"),
        sa.ForeignKeyConstraint(["task_seq"], ["task.seq"], name="fk_assignment_task_seq"),
        sa.PrimaryKeyConstraint("id", name="pk_assignment"),
        sa.UniqueConstraint("task_seq", "account_id", name="uq_assignment_task_seq_account_id"),
        sa.UniqueConstraint("task_seq", "slot", name="uq_assignment_task_seq_slot"),
    )
    op.create_index("ix_assignment_expired", "assignment", ["state", "lease_until"], unique=False)
    op.create_index("ix_assignment_mine", "assignment", ["account_id", "state"], unique=False)
    op.create_index(
        "ix_task_next",
        "task",
        [sa.text("priority DESC"), "seq"],
        sqlite_where=sa.text("free > 0 AND closed IS 0"),
        postgresql_where=sa.text("free > 0 AND closed IS false"),
    )


def _answers() -> None:
    op.create_table(
        "judgment",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("assignment_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("fence", sa.Integer(), nullable=False),
        sa.Column("late", sa.Boolean(), nullable=False),
        sa.Column("ranks", sa.JSON(), nullable=False),
        sa.Column("strength", sa.Integer(), nullable=True),
        sa.Column("flags", sa.JSON(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("ms_visible", sa.Integer(), nullable=True),
        sa.Column("guideline_version", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_judgment_account_id"),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignment.id"], name="fk_judgment_assignment_id"),
        sa.PrimaryKeyConstraint("id", name="pk_judgment"),
        sa.UniqueConstraint("assignment_id", "revision", name="uq_judgment_assignment_id_revision"),
        sa.UniqueConstraint("key", name="uq_judgment_key"),
    )
    op.create_index("ix_judgment_recent", "judgment", ["account_id", "created_at"], unique=False)
    op.create_table(
        "skip",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("assignment_id", sa.Integer(), nullable=False),
        sa.Column("account_id", sa.Integer(), nullable=False),
        sa.Column("key", sa.String(), nullable=False),
        sa.Column("flags", sa.JSON(), nullable=False),
        sa.Column("reason", sa.String(), nullable=False),
        sa.Column("created_at", sa.Double(), nullable=False),
        sa.ForeignKeyConstraint(["account_id"], ["account.id"], name="fk_skip_account_id"),
        sa.ForeignKeyConstraint(["assignment_id"], ["assignment.id"], name="fk_skip_assignment_id"),
        sa.PrimaryKeyConstraint("id", name="pk_skip"),
        sa.UniqueConstraint("key", name="uq_skip_key"),
    )
    op.create_index("ix_skip_account_id", "skip", ["account_id"], unique=False)
