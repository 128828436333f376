// An error in words. If the server sent Retry-After, the seconds are counted down.
import { html, useEffect, useState } from "./ui.js";

const ADVICE = {
  model_not_found: "It may have been removed or renamed. Choose who answers from the list above.",
  alias_target_missing: "The alias leads to an adapter that is not loaded.",
  server_shutting_down: "The server is stopping. What came until now is kept.",
  unreachable: "What you wrote is kept; try again when the server is back.",
  cut_off: "What came until now is kept.",
  page_closed: "What came until now is kept.",
};

export function Failure({ error, onRetry }) {
  const left = useCountdown(error);
  return html`<div class="failure">
    <p><strong>${error.message}</strong> ${ADVICE[error.code] ?? ""}</p>
    <p class="small">${[error.status ? `status ${error.status}` : "", error.code ?? "", error.requestId ? `request ${error.requestId}` : ""]
      .filter(Boolean).join(" · ")}</p>
    ${onRetry && html`<button type="button" onClick=${onRetry}>
      ${left > 0 ? `Try again (the server asks to wait ${left} s)` : "Try again"}</button>`}
  </div>`;
}

// Whole seconds until the server wants to be asked again.
function useCountdown({ retryAfter, at }) {
  const remaining = () => (retryAfter ? Math.max(0, Math.ceil((at + retryAfter * 1000 - Date.now()) / 1000)) : 0);
  const [left, setLeft] = useState(remaining());
  useEffect(() => {
    if (!retryAfter) return undefined;
    const timer = setInterval(() => {
      setLeft(remaining());
      if (!remaining()) clearInterval(timer);
    }, 250);
    return () => clearInterval(timer);
  }, [retryAfter, at]);
  return left;
}
