"""Conversations on pages of your own: asked by a form, answered as the answer comes.

For people whom the site knows by its session: its CSRF protection and its login hold here, and
``MAY_USE_CONVERSATION`` says who may. No models, so a URLconf, not an app.
"""
