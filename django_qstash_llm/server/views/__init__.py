"""QStash's REST API, as its SDKs call it: one module a noun."""
