"""Minimal views that forward a chat with httpx and record nothing: URLconfs for WSGI and for ASGI."""
