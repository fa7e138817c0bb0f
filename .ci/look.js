// Open every page of a folder in headless Chromium, as wide as a phone and as a desk, and report what is wider than its
// column or fetched from elsewhere: `node look.js FOLDER [PAGE ...]`. Pages that are named are also photographed, FOLDER/shots.
const fs = require('fs'), path = require('path')
const folder = path.resolve(process.argv[2]), named = process.argv.slice(3)
const { chromium } = require(path.join(folder, 'node/node_modules/playwright-core'))
const pages = named.length ? named : fs.readdirSync(folder, { recursive: true }).filter(f => f.endsWith('.html') && !/node|\.dark/.test(f)).sort()

function wide() { // elements that stick out of the column and are not inside something that scrolls
  const edge = document.querySelector('main').getBoundingClientRect().right + 2, found = []
  for (const e of document.querySelectorAll('main *')) {
    const box = e.getBoundingClientRect()
    if (!box.width || box.right <= edge) continue
    let a = e.parentElement
    while (a.tagName !== 'MAIN' && (getComputedStyle(a).overflowX === 'visible' || a.getBoundingClientRect().right > edge)) a = a.parentElement
    if (a.tagName === 'MAIN') found.push(`${e.tagName.toLowerCase()} "${e.textContent.trim().slice(0, 40)}"`)
  }
  return found
}

(async () => {
  const browser = await chromium.launch({ executablePath: process.env.CHROMIUM || '/usr/bin/chromium', args: ['--no-sandbox', '--allow-file-access-from-files'] })
  let wrong = 0
  for (const width of [390, 1400]) {
    const tab = await browser.newPage({ viewport: { width, height: 900 } })
    let outside = []
    tab.on('request', r => { if (/^https?:/.test(r.url())) outside.push(r.url()) })
    for (const page of pages) {
      outside = []
      await tab.goto('file://' + path.join(folder, page))
      const found = [...(await tab.evaluate(wide)).slice(0, 3).map(o => 'too wide: ' + o), ...outside.map(o => 'fetched: ' + o)]
      for (const o of found) console.log(`${page} at ${width}: ${o}`)
      wrong += found.length
      if (named.length) await tab.screenshot({ path: path.join(folder, 'shots', `${page.replaceAll('/', '_')}_${width}.png`), fullPage: true })
    }
  }
  await browser.close()
  console.log(`${pages.length} pages at two widths, ${wrong} problems`)
  process.exit(wrong ? 1 : 0)
})()
