// What the scripts of this folder share: `check` runs one check and prints a JSON line for run.py.

export const URL = process.env.GUANACO_URL
export const MODEL = process.env.GUANACO_MODEL
export const QUESTION = 'How do I boil an egg?'

export async function check(name, run) {
  let ok = true
  let detail = ''
  try {
    detail = (await run()) ?? ''
  } catch (error) {
    ok = false
    detail = `${error.name}: ${error.message} ${error.responseBody ?? ''}`
  }
  const text = typeof detail === 'string' ? detail : JSON.stringify(detail)
  // The order of the keys is what run.py looks for.
  console.log('\n' + JSON.stringify({ check: name, ok, detail: text.replace(/\s+/g, ' ').slice(0, 300) }))
}

export async function requestsInWork() {
  const lines = (await (await fetch(`${URL}/metrics`)).text()).split('\n')
  const running = lines.filter((line) => line.startsWith('vllm:num_requests_running'))
  return running.reduce((sum, line) => sum + Number(line.split(' ').pop()), 0)
}

export async function becomesIdle(seconds = 30) {
  const end = Date.now() + seconds * 1000
  while (await requestsInWork()) {
    if (Date.now() > end) return false
    await new Promise((done) => setTimeout(done, 100))
  }
  return true
}
