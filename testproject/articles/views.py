from __future__ import annotations

from django.contrib.auth.decorators import login_required
from django.http import HttpRequest, HttpResponse
from django.shortcuts import render

from django_qstash_llm.models import Conversation


@login_required(login_url="admin:login")
def talk(request: HttpRequest) -> HttpResponse:
    """Each user's one conversation. Asking and answering are the package's."""
    conversation, _ = Conversation.objects.get_or_create(
        user=request.user, title="Talk", defaults={"system": "Answer in three sentences."}
    )
    return render(request, "articles/talk.html", {"conversation": conversation})
