"""A model of full tables that has been trained, which README compresses and serves."""

from page_models import full_dlrm

trained = full_dlrm(users=10_000)
